"""A sparse model measured against the dense model that it was made of.

Shapes: B windows of a batch, T tokens, V vocabulary.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.analysis.certificate.losses import WindowSums, compare_windows, gap_interval
from lightning_dsmoe.analysis.certificate.mixtures import ErrorTotals, MixtureErrors, token_errors
from lightning_dsmoe.analysis.held_out import HeldOut
from lightning_dsmoe.data.windows import IGNORED
from lightning_dsmoe.decoder import Decoder, Routings
from lightning_dsmoe.inference import SparseModel
from lightning_dsmoe.metrics import (
    ActiveParameters,
    active_masks,
    count_parameters,
    routing_agreement,
)
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.serialization.architecture import build_decoder


class Judgement(NamedTuple):
    """A sparse model against the dense one on the same text; losses in nats per token.

    Args:
        tokens: tokens that were predicted.
        windows: windows that they came in.
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
            and the trained decoder, relative to the largest logit: rounding, or in 8 bits what
            quantisation costs; None without a trained decoder.
        loss_before_quantization: cross entropy of the trained decoder under the plan; None if
            nothing is quantised or there is no trained decoder.
        routing_agreement: share of all choices of experts that quantisation leaves as they are;
            None in the same cases.
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
        decoder: the trained decoder; without it the sparse model with all experts stands for it.

    Raises:
        FloatingPointError: if a loss is not a finite number.
        ValueError: if no token counts.
    """
    everyone = SelectionPlan.uniform(model.decoder.n_layers)
    device = model.decoder.embedding.weight.device
    counts = count_parameters(build_decoder(model.architecture))
    active = ActiveParameters(counts, sync_on_compute=False).to(device)  # one rank measures
    mixtures: _Mixtures = {}
    trained = None if decoder is None else _Trained(decoder, model)
    windows: list[WindowSums] = []
    for inputs, labels in text.batches:
        inputs_BT, labels_BT = inputs.to(device), labels.to(device)
        mask_BT = labels_BT != IGNORED
        dense_BTV = model(inputs_BT, everyone).logits
        sparse_BTV, routings = model(inputs_BT)
        if trained is not None:
            dense_BTV = trained.add(inputs_BT, labels_BT, dense_BTV, routings)
        windows.append(compare_windows(dense_BTV, sparse_BTV, labels_BT))
        active.update(*active_masks(routings, model.plan, model.decoder), mask_BT)
        _add_mixtures(mixtures, model, inputs_BT, mask_BT)
    sums = WindowSums(*(torch.cat(parts) for parts in zip(*windows, strict=True)))
    tokens = int(sums.tokens.sum())
    if not tokens:
        raise ValueError("the text has no token to predict")
    dense_loss, sparse_loss, kl, agreed = (x.sum().item() / tokens for x in sums[:-1])
    if not torch.tensor([dense_loss, sparse_loss, kl]).isfinite().all():
        raise FloatingPointError(f"the loss is {dense_loss}, of the sparse model {sparse_loss}")
    counted_W = sums.tokens > 0
    share = active.compute()
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
        experts=_computed(mixtures, "experts", model.decoder.n_layers),
        attention=_computed(mixtures, "attention", model.decoder.n_layers),
    )


class _Trained:
    """The trained decoder on the same batches."""

    def __init__(self, decoder: Decoder, model: SparseModel) -> None:
        self.decoder = decoder
        self.plan = model.plan
        self.quantized = bool(model.report().quantized)
        self.loss = self.routed_alike = 0.0
        self._off = self._largest = 0.0

    @property
    def all_experts_error(self) -> float:
        return self._off / self._largest if self._largest else self._off

    def add(
        self, inputs_BT: Tensor, labels_BT: Tensor, all_BTV: Tensor, routings: Routings
    ) -> Tensor:
        """Compare a batch with the sparse model's logits and routings, and give the own logits."""
        was_training = self.decoder.training
        self.decoder.eval()
        dense_BTV = self.decoder(inputs_BT).logits
        self._off = max(self._off, (all_BTV - dense_BTV).abs().max().item())
        self._largest = max(self._largest, dense_BTV.abs().max().item())
        if self.quantized:
            mask_BT = labels_BT != IGNORED
            exact_BTV, exact_routings = self.decoder(inputs_BT, self.plan)
            self.loss += compare_windows(exact_BTV, exact_BTV, labels_BT).dense_loss.sum().item()
            alike = routing_agreement(routings, exact_routings, self.plan, mask_BT)
            self.routed_alike += (alike * mask_BT.sum()).item()
        self.decoder.train(was_training)
        logits: Tensor = dense_BTV
        return logits


_Mixtures = dict[tuple[str, int], ErrorTotals]


def _add_mixtures(
    mixtures: _Mixtures, model: SparseModel, inputs_BT: Tensor, mask_BT: Tensor
) -> None:
    errors = token_errors(model.decoder, inputs_BT, model.plan)
    for kind, layers in errors._asdict().items():
        for layer, found in enumerate(layers):
            if found is not None:
                mixtures.setdefault((kind, layer), ErrorTotals()).add(found, mask_BT)


def _computed(mixtures: _Mixtures, kind: str, n_layers: int) -> list[MixtureErrors | None]:
    totals = [mixtures.get((kind, layer)) for layer in range(n_layers)]
    return [None if each is None else each.compute() for each in totals]
