"""A sparse model measured against the dense model that it was made of.

Shapes: B windows in a batch, T positions, V vocabulary, W windows of a text.
"""

from collections import defaultdict
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe import metrics
from lightning_dsmoe.analysis.certificate.losses import WindowSums, compare_windows, gap_interval
from lightning_dsmoe.analysis.certificate.mixtures import ErrorTotals, MixtureErrors, token_errors
from lightning_dsmoe.analysis.held_out import HeldOut
from lightning_dsmoe.data.windows import IGNORED
from lightning_dsmoe.decoder import Decoder, Routings
from lightning_dsmoe.inference import SparseModel
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.routing.routing import block_layer_name
from lightning_dsmoe.serialization.architecture import build_decoder


class Judgement(NamedTuple):
    """A sparse model against the dense one on the same text; losses in nats per token.

    The names of the fields are those in certificate.json.

    Args:
        tokens: predicted tokens.
        windows: windows with such tokens.
        dense: "checkpoint" if the trained decoder was the dense model, "artifact" if it was the
            sparse model itself with all experts running.
        dense_loss: cross entropy of the dense model.
        sparse_loss: cross entropy of the sparse model under its plan.
        relative_gap: sparse_loss / dense_loss - 1.
        relative_gap_95: its 95 % bootstrap interval over windows; None for a single window.
        kl: mean of KL(dense || sparse) of the next token's distribution.
        top_1_agreement: share of tokens for which both find the same next token most probable.
        active_share_mean: share of the hidden parameters that run for a token.
        active_share_p50: its median over tokens.
        active_share_p95: its 95th percentile.
        all_experts_error: largest difference of a logit between the sparse model with all experts
            and the trained decoder, relative to the largest logit: rounding, or the error of
            quantization; None without a trained decoder.
        loss_before_quantization: cross entropy of the trained decoder under the plan; None if
            nothing is quantised or there is no trained decoder.
        routing_agreement: share of all choices of experts that quantization does not change; None
            in the same cases.
        experts: what the plan changes in the mixture of experts of each layer; None for a layer
            without one.
        attention: the same for the mixtures of attention heads.
    """

    tokens: int
    windows: int
    dense: Literal["checkpoint", "artifact"]
    dense_loss: float
    sparse_loss: float
    relative_gap: float
    relative_gap_95: tuple[float, float] | None
    kl: float
    top_1_agreement: float
    active_share_mean: float
    active_share_p50: float
    active_share_p95: float
    all_experts_error: float | None
    loss_before_quantization: float | None
    routing_agreement: float | None
    experts: list[MixtureErrors | None]
    attention: list[MixtureErrors | None]


@torch.inference_mode()
def judge(model: SparseModel, text: HeldOut, decoder: Decoder | None = None) -> Judgement:
    """Measure a sparse model under its plan against the dense one, in one pass over a text.

    Args:
        model: the sparse model.
        text: windows of held-out text.
        decoder: the trained decoder; by default the sparse model with all experts takes its place.

    Raises:
        FloatingPointError: if a loss is not a finite number.
        ValueError: if no token counts.
    """
    device = model.decoder.embedding.weight.device
    counts = metrics.count_parameters(build_decoder(model.architecture))
    active = metrics.ActiveSums(counts)
    all_experts = SelectionPlan()
    totals: dict[str, ErrorTotals] = defaultdict(ErrorTotals)
    trained = None if decoder is None else _Trained(decoder, model)
    windows: list[WindowSums] = []
    for inputs, labels in text.batches:
        inputs_BT, labels_BT = inputs.to(device), labels.to(device)
        mask_BT = labels_BT != IGNORED
        dense_BTV = model(inputs_BT, all_experts).logits
        sparse_BTV, routings = model(inputs_BT)
        if trained is not None:
            dense_BTV = trained.add(inputs_BT, labels_BT, dense_BTV, routings)
        windows.append(compare_windows(dense_BTV, sparse_BTV, labels_BT))
        active.add(metrics.active_masks(routings, model.plan, model.decoder), mask_BT)
        if counts.layers:
            run = partial(model.decoder, inputs_BT)
            for name, errors in token_errors(model.decoder, model.plan, run).items():
                totals[name].add(errors, mask_BT)
    sums = WindowSums(*(torch.cat(parts) for parts in zip(*windows, strict=True)))
    tokens = int(sums.tokens.sum())
    if not tokens:
        raise ValueError("the text has no token to predict")
    dense_loss, sparse_loss, kl, agreed = (x.sum().item() / tokens for x in sums[:-1])
    if not torch.tensor([dense_loss, sparse_loss, kl]).isfinite().all():
        raise FloatingPointError(f"the loss is {dense_loss}, of the sparse model {sparse_loss}")
    counted_W = sums.tokens > 0
    share = active.share()
    mixtures = {name: total.compute() for name, total in totals.items()}
    blocks = range(model.decoder.n_layers)
    quantized = None if trained is None or not trained.quantized else trained
    return Judgement(
        tokens=tokens,
        windows=int(counted_W.sum()),
        dense="artifact" if trained is None else "checkpoint",
        dense_loss=dense_loss,
        sparse_loss=sparse_loss,
        relative_gap=sparse_loss / dense_loss - 1,
        relative_gap_95=gap_interval(sums.dense_loss[counted_W], sums.sparse_loss[counted_W]),
        kl=max(0.0, kl),
        top_1_agreement=agreed,
        active_share_mean=share.mean.item(),
        active_share_p50=share.p50.item(),
        active_share_p95=share.p95.item(),
        all_experts_error=None if trained is None else trained.all_experts_error,
        loss_before_quantization=None if quantized is None else quantized.loss / tokens,
        routing_agreement=None if quantized is None else quantized.routed_alike / tokens,
        experts=[mixtures.get(block_layer_name(block, "experts")) for block in blocks],
        attention=[mixtures.get(block_layer_name(block, "attention")) for block in blocks],
    )


class _Trained:
    """The trained decoder on the same batches."""

    def __init__(self, decoder: Decoder, model: SparseModel) -> None:
        self.decoder = decoder
        self.plan = model.plan
        self.quantized = bool(model.report().quantized)
        self.loss = self.routed_alike = 0.0
        self._difference = self._largest = 0.0

    @property
    def all_experts_error(self) -> float:
        return self._difference / self._largest if self._largest else self._difference

    def add(
        self, inputs_BT: Tensor, labels_BT: Tensor, all_BTV: Tensor, routings: Routings
    ) -> Tensor:
        """Compare a batch with the sparse model; return the decoder's logits."""
        was_training = self.decoder.training
        self.decoder.eval()
        dense_BTV = self.decoder(inputs_BT).logits
        difference = (all_BTV - dense_BTV).abs().max().item()
        self._difference = max(self._difference, difference)
        self._largest = max(self._largest, dense_BTV.abs().max().item())
        if self.quantized:
            mask_BT = labels_BT != IGNORED
            exact_BTV, exact_routings = self.decoder(inputs_BT, self.plan)
            self.loss += compare_windows(exact_BTV, exact_BTV, labels_BT).dense_loss.sum().item()
            alike = metrics.routing_agreement(routings, exact_routings, self.plan, mask_BT)
            self.routed_alike += (alike * mask_BT.sum()).item()
        self.decoder.train(was_training)
        logits: Tensor = dense_BTV
        return logits
