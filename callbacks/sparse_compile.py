"""Writes the sparse model when training is done."""

from itertools import islice
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info

from lightning_dsmoe.analysis import HeldOut
from lightning_dsmoe.analysis.certificate import Source, TextSource, certificate
from lightning_dsmoe.analysis.certificate_judgement import judge
from lightning_dsmoe.callbacks.layer_selections import PlanSpec, load_plan, plan_for
from lightning_dsmoe.data import TextDataModule
from lightning_dsmoe.data.windows import IGNORED
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference import SparseModel, compile_sparse
from lightning_dsmoe.inference.architecture import describe_decoder
from lightning_dsmoe.inference.artifact import check_free
from lightning_dsmoe.inference.engine.packing import Quantization


class SparseCompile(Callback):
    """Compiles the trained model under a plan after `fit`, measures it and writes its artifact.

    The measurement runs the compiled model and the trained one on the same validation batches and
    tells what `Judgement` holds. It goes into the artifact's `certificate.json`, which
    `lightning-dsmoe certify` checks, and into its model card. With `fast_dev_run` nothing is
    written.

    Args:
        plan: selections for all layers, a plan, or the path of a saved plan.
        quantization: "int8" puts the routed experts into 8 bits with bitsandbytes.
        quantize_head: put the last projection into 8 bits too.
        calibrate: measure on this machine which way of running experts is the fastest for how many
            tokens, which takes about a minute, and keep that in the artifact.
        path: directory of the artifact; by default `sparse` in the run's log directory. An earlier
            artifact there is replaced.
        max_batches: validation batches to measure on; 0 measures nothing.

    Raises:
        ValueError: if a file is not a plan or an option is out of range, and before training if
            the plan does not fit the model, the model cannot be described or the strategy shards
            it.
        FileExistsError: before training, if something else than an artifact is at `path`.
    """

    def __init__(
        self,
        plan: PlanSpec,
        *,
        quantization: Quantization | None = None,
        quantize_head: bool = False,
        calibrate: bool = False,
        path: str | None = None,
        max_batches: int = 50,
    ) -> None:
        if max_batches < 0:
            raise ValueError(f"max_batches must be 0 or more, got {max_batches}")
        self.plan = load_plan("SparseCompile", plan)
        self.quantization = quantization
        self.quantize_head = quantize_head
        self.calibrate = calibrate
        self.path = path
        self.max_batches = max_batches
        self.artifact: Path | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        decoder = _decoder(pl_module)
        plan_for("SparseCompile", self.plan, decoder)
        describe_decoder(decoder)
        if (folder := self._folder(trainer)) is not None:
            check_free(folder)
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise ValueError(
                "SparseCompile needs whole weights, but the strategy shards them; consolidate the "
                "checkpoint after training and call compile_sparse on it"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = self._folder(trainer)
        if folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.is_global_zero:
            decoder = _decoder(pl_module)
            data = getattr(trainer, "datamodule", None)
            tokenizer = getattr(data, "tokenizer", None)
            model = compile_sparse(
                decoder,
                plan_for("SparseCompile", self.plan, decoder),
                quantization=self.quantization,
                quantize_head=self.quantize_head,
                context=getattr(data, "context", None),
                tokenizer=None if tokenizer is None else tokenizer.to_dict(),
            )
            if self.calibrate:
                rank_zero_info(f"Measured for the sparse model: {model.calibrate()}")
            model.save(folder, certificate=self._measure(trainer, decoder, model))
            rank_zero_info(f"The sparse model is in {folder}")
        trainer.strategy.barrier()
        self.artifact = folder

    def _folder(self, trainer: Trainer) -> Path | None:
        if self.path is not None:
            return Path(self.path)
        return None if trainer.log_dir is None else Path(trainer.log_dir) / "sparse"

    def _measure(
        self, trainer: Trainer, decoder: Decoder, model: SparseModel
    ) -> dict[str, Any] | None:
        """Judge the compiled model against the trained one on validation batches."""
        loader = trainer.val_dataloaders
        if loader is None or not self.max_batches:
            return None
        batches = [
            (batch["input_ids"].cpu(), batch["labels"].cpu())
            for batch in islice(loader, self.max_batches)
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


def _source(trainer: Trainer) -> TextSource:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, TextDataModule) or trainer.world_size > 1:  # a part of the windows
        return TextSource("other", "val")
    source: Source = "standard library" if data.files is None else "files"
    return TextSource(source, "val", data.val_fraction, data.test_fraction)


def _decoder(pl_module: LightningModule) -> Decoder:
    decoder = pl_module.decoder
    assert isinstance(decoder, Decoder)
    return decoder
