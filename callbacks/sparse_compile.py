"""Writes the sparse model when training is done."""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F

from lightning_dsmoe.callbacks.layer_selections import PlanSpec, load_plan, plan_for
from lightning_dsmoe.data.windows import IGNORED
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference import SparseModel, compile_sparse
from lightning_dsmoe.inference.architecture import describe_decoder
from lightning_dsmoe.inference.artifact import check_free
from lightning_dsmoe.inference.engine.packing import Quantization
from lightning_dsmoe.metrics import (
    ActiveParameters,
    active_masks,
    count_parameters,
    routing_agreement,
)


class SparseCompile(Callback):
    """Compiles the trained model under a plan after `fit`, measures it and writes its artifact.

    The measurement runs the compiled model and the trained one on the same validation batches. Of a
    quantised model it also tells the loss without quantisation and how often both choose the same
    experts. It goes into the artifact's `certificate.json` and its model card.

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
        if folder is None:
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

    @torch.inference_mode()
    def _measure(
        self, trainer: Trainer, decoder: Decoder, model: SparseModel
    ) -> dict[str, Any] | None:
        """Compare the compiled model with the trained one on validation batches."""
        loader = trainer.val_dataloaders
        if loader is None or not self.max_batches:
            return None
        device = decoder.embedding.weight.device
        quantized = bool(model.report().quantized)
        active = ActiveParameters(count_parameters(decoder)).to(device)
        dense_nll = sparse_nll = exact_nll = torch.zeros((), dtype=torch.float64, device=device)
        routed_alike = torch.zeros((), dtype=torch.float64, device=device)
        agreed = tokens = torch.zeros((), dtype=torch.int64, device=device)
        was_training = decoder.training
        decoder.eval()
        for batch in islice(loader, self.max_batches):
            inputs, labels = batch["input_ids"].to(device), batch["labels"].to(device)
            mask_BT = labels != IGNORED
            dense_BTV, _ = decoder(inputs)
            sparse_BTV, routings = model(inputs)
            if quantized:
                exact_BTV, exact_routings = decoder(inputs, model.plan)
                exact_nll = exact_nll + _nll(exact_BTV, labels)
                alike = routing_agreement(routings, exact_routings, model.plan, mask_BT)
                routed_alike = routed_alike + alike * mask_BT.sum()
            dense_nll = dense_nll + _nll(dense_BTV, labels)
            sparse_nll = sparse_nll + _nll(sparse_BTV, labels)
            agreed = agreed + (dense_BTV.argmax(-1) == sparse_BTV.argmax(-1))[mask_BT].sum()
            tokens = tokens + mask_BT.sum()
            active.update(*active_masks(routings, model.plan), mask_BT)
        decoder.train(was_training)
        if not tokens:
            return None
        if not (dense_nll + sparse_nll).isfinite():
            raise FloatingPointError(
                f"the loss is {(dense_nll / tokens).item()}, of the sparse model "
                f"{(sparse_nll / tokens).item()}; no sparse model was written"
            )
        share = active.compute()
        measured = {
            "tokens": int(tokens),
            "dense_loss": (dense_nll / tokens).item(),
            "sparse_loss": (sparse_nll / tokens).item(),
            "relative_gap": (sparse_nll / dense_nll - 1).item(),
            "top_1_agreement": (agreed / tokens).item(),
            "active_share_mean": share.mean.item(),
            "active_share_p50": share.p50.item(),
            "active_share_p95": share.p95.item(),
        }
        if quantized:
            measured["loss_before_quantization"] = (exact_nll / tokens).item()
            measured["routing_agreement"] = (routed_alike / tokens).item()
            rank_zero_info(
                f"In 8 bits the loss is {measured['sparse_loss']:.4f} instead of "
                f"{measured['loss_before_quantization']:.4f}; "
                f"{measured['routing_agreement']:.2%} of all choices of experts are the same"
            )
        return measured


def _decoder(pl_module: LightningModule) -> Decoder:
    decoder = pl_module.decoder
    assert isinstance(decoder, Decoder)
    return decoder


def _nll(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    return F.cross_entropy(
        logits_BTV.flatten(0, 1).double(),
        labels_BT.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
