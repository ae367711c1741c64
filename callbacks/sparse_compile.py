"""Writes the artifact of the sparse model after training."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_dsmoe.analysis import HeldOut
from lightning_dsmoe.analysis.certificate.judgement import judge
from lightning_dsmoe.analysis.certificate.record import Source, TextSource, certificate
from lightning_dsmoe.callbacks.naming import check_name
from lightning_dsmoe.callbacks.needs import PlanSpec, check_runs, load_plan
from lightning_dsmoe.data import TextDataModule
from lightning_dsmoe.data.windows import IGNORED, EvaluationSampler
from lightning_dsmoe.inference import SparseModel, compile_sparse
from lightning_dsmoe.inference.artifact.directory import check_free
from lightning_dsmoe.inference.compilation import language_model
from lightning_dsmoe.inference.engine.weights.packing import Quantization
from lightning_dsmoe.moved import renamed_attributes, warn_renamed
from lightning_dsmoe.serialization.architecture import describe_decoder
from lightning_dsmoe.training.rank_zero import on_rank_zero
from lightning_dsmoe.training.run_folder import run_folder

_RESERVED = {"checkpoints", "utilization"}
"""Folders of a run that `ModelCheckpoint` and `ExpertUtilizationMonitor` write to."""


@renamed_attributes(calibrate="tune")
class SparseCompile(Callback):
    """Compiles the trained model under a plan after `fit`, measures it and writes its artifact.

    A `DSMoELanguageModel` becomes a `SparseModel`, any other module with routed layers a copy whose
    layers are packed; see `compile_sparse`.

    The measurement compares a compiled language model with the trained one on the same validation
    batches. It goes into the artifact's `certificate.json`, which `lightning-dsmoe certify`
    verifies, and into its model card. After `fit`, `artifact` is its directory; with `fast_dev_run`
    nothing is written and it is None.

    Args:
        plan: a plan, or the path of a saved one.
        quantization: "int8" quantizes the routed experts to 8 bits with bitsandbytes.
        quantize_head: quantize the output head to 8 bits too.
        tune: measure on this machine which method of running experts is the fastest for how many
            tokens, which takes about a minute, and keep that in the artifact.
        calibrate: old name of `tune`, until version 0.3.
        name: name of the artifact in the log directory of the run; several of these callbacks need
            different ones.
        path: directory of the artifact instead. An earlier artifact there is replaced.
        max_batches: validation batches to measure on; 0 measures nothing.

    Raises:
        ValueError: if a file is not a plan or an option is out of range, and before training if
            the model has no routed layers, the plan does not fit it, it cannot be described, the
            strategy shards it or another SparseCompile writes to the same place.
        FileExistsError: before training, if something else than an artifact is at `path`, or
            anything in the place of the artifact in the log directory.

    Examples:
        >>> from lightning_dsmoe import SelectionPlan, Threshold
        >>> from lightning_dsmoe.callbacks import SparseCompile
        >>> plan = SelectionPlan(experts=Threshold(0.1), attention=Threshold(0.1))
        >>> SparseCompile(plan, quantization="int8", name="sparse_int8").artifact is None
        True
    """

    def __init__(
        self,
        plan: PlanSpec,
        *,
        quantization: Quantization | None = None,
        quantize_head: bool = False,
        tune: bool = False,
        calibrate: bool = False,
        name: str = "sparse",
        path: str | None = None,
        max_batches: int = 50,
    ) -> None:
        check_name("the name of an artifact", name)
        if name in _RESERVED:
            raise ValueError(
                f"the run has a folder {name!r} of its own: name the artifact otherwise"
            )
        if max_batches < 0:
            raise ValueError(f"max_batches must be 0 or more, got {max_batches}")
        self.plan = load_plan("SparseCompile", plan)
        self.quantization = quantization
        self.quantize_head = quantize_head
        if calibrate:
            warn_renamed("SparseCompile(calibrate=)", "tune=")
        self.tune = tune or calibrate
        self.name = name
        self.path = path
        self.max_batches = max_batches
        self.artifact: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Here rather than in `on_fit_start`: the command line writes its configuration later in
        # `setup`, over that of an earlier run in the same folder.
        if stage != "fit":
            return
        self._check_place(trainer)
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise ValueError(
                "SparseCompile needs whole weights, but the strategy shards them; leave it out and "
                "after training run `lightning-dsmoe compile` on the checkpoint, or on what "
                "`lightning-dsmoe consolidate` makes of a folder"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_runs("SparseCompile", self.plan, pl_module)
        decoder = language_model(pl_module)
        if decoder is not None:
            describe_decoder(decoder)
        elif self.tune or self.quantize_head:
            raise ValueError(
                "SparseCompile: tune and quantize_head are for language models, such as "
                f"DSMoELanguageModel, got a {type(pl_module).__name__}"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (folder := self._folder(trainer)) is None:
            return
        folder = trainer.strategy.broadcast(self._free(folder))
        on_rank_zero(trainer, lambda: self._write(trainer, pl_module, folder))
        self.artifact = folder

    def _folder(self, trainer: Trainer) -> Path | None:
        """Directory of the artifact; None if none is written."""
        if self.path is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            return Path(self.path)
        run = run_folder(trainer)
        return None if run is None else run / self.name

    def _free(self, folder: Path) -> Path:
        """The artifact's folder, or one beside it if another run has written to it meanwhile."""
        if self.path is not None or folder == self.artifact:
            return folder
        free, number = folder, 0
        while free.exists():
            number += 1
            free = folder.with_name(f"{folder.name}_{number}")
        if number:
            rank_zero_warn(f"{folder} is of another run, so the sparse model goes to {free}")
        return free

    def _check_place(self, trainer: Trainer) -> None:
        folder = self._folder(trainer)
        if folder is None:
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if isinstance(c, SparseCompile) and c is not self]
        places = [place.resolve() for c in others if (place := c._folder(trainer)) is not None]
        if folder.resolve() in places:
            raise ValueError(
                f"more than one SparseCompile writes to {folder}: give each another name or path"
            )
        check_free(folder)
        if self.path is None and folder != self.artifact and folder.exists():
            raise FileExistsError(
                f"{folder} is the sparse model of an earlier run with the same log directory: give "
                "SparseCompile another name or a path, or the logger another version"
            )

    def _write(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
        # What only a model of text can have.
        data = getattr(trainer, "datamodule", None) if language_model(pl_module) else None
        tokenizer = getattr(data, "tokenizer", None)
        model = compile_sparse(
            pl_module,
            self.plan,
            quantization=self.quantization,
            quantize_head=self.quantize_head,
            context_length=getattr(data, "context", None),
            tokenizer=None if tokenizer is None else tokenizer.to_dict(),
        )
        if self.tune:
            rank_zero_info(f"Measured for the sparse model: {model.tune()}")
        model.save(folder, certificate=self._certificate(trainer, pl_module, model))
        rank_zero_info(f"The sparse model is in {folder}")

    def _certificate(
        self, trainer: Trainer, pl_module: LightningModule, model: SparseModel
    ) -> dict[str, Any] | None:
        """Judge a compiled language model against the trained one on validation batches."""
        decoder = language_model(pl_module)
        if decoder is None or trainer.val_dataloaders is None or not self.max_batches:
            return None
        batches = [
            (batch["input_ids"].cpu(), batch["labels"].cpu())
            for batch in islice(_validation_batches(trainer), self.max_batches)
        ]
        text = HeldOut(batches, sum(int((labels != IGNORED).sum()) for _, labels in batches))
        if not text.n_tokens:
            return None
        try:
            judgement = judge(model, text, decoder)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; no sparse model was written") from None
        before, same = judgement.loss_before_quantization, judgement.routing_agreement
        if before is not None and same is not None:
            rank_zero_info(
                f"In 8 bits the loss is {judgement.sparse_loss:.4f} instead of {before:.4f}; "
                f"{same:.2%} of all choices of experts are the same"
            )
        return certificate(judgement, text, _source(trainer))


def _validation_batches(trainer: Trainer) -> Iterable[dict[str, Tensor]]:
    """Those of one process, also where each of several ranks has a part of them."""
    loader: Iterable[dict[str, Tensor]] = CombinedLoader(trainer.val_dataloaders).flattened[0]
    # Only these samplers are known to read the whole dataset in order, all ranks together.
    samplers = DistributedSampler, EvaluationSampler
    if (
        not isinstance(loader, DataLoader)
        or type(loader.sampler) not in samplers
        or getattr(loader.sampler, "shuffle", True)
    ):
        return loader
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        # A loader draws a seed: without its own generator, one of training's random numbers.
        generator=torch.Generator(),
    )


def _source(trainer: Trainer) -> TextSource:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, TextDataModule):
        return TextSource("other", "val")
    source: Source = "standard library" if data.files is None else "files"
    return TextSource(source, "val", data.val_fraction, data.test_fraction)
