"""How a model uses its experts on a text: gates with all experts, and which run under a plan.

Shapes: B windows, T tokens of a window, V vocabulary, N tokens, E experts, U frequent tokens.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe import metrics
from lightning_dsmoe.analysis.held_out import HeldOut
from lightning_dsmoe.analysis.report.lift import FrequentTokens
from lightning_dsmoe.data.windows import IGNORED
from lightning_dsmoe.decoder import Routings
from lightning_dsmoe.inference import SparseModel
from lightning_dsmoe.losses.cross_entropy import summed_cross_entropy
from lightning_dsmoe.metrics.expert_utilization import utilization_of_sums, utilization_sums
from lightning_dsmoe.routing import Routing, Selection, SelectionPlan, routed_layers

_MOST_PAIRS = 2**27  # 1 GiB of counts in float64


class RouterUse(NamedTuple):
    """How one router uses its experts.

    Args:
        gates: gate shares and entropies, with all experts running.
        together_EE: share of the tokens for which two experts both run under the plan; on the
            diagonal the share for which each one runs.
        token_gates_UE: mean gate of each expert on each frequent token, with all experts running.
        best_N: top-1 expert of each token, with all experts running.
    """

    gates: metrics.Utilization
    together_EE: Tensor
    token_gates_UE: Tensor
    best_N: Tensor

    @property
    def running_E(self) -> Tensor:
        """Share of the tokens for which each expert runs under the plan."""
        return self.together_EE.diagonal()

    @property
    def dead_experts(self) -> list[int]:
        """Experts with a gate share below the threshold, or that never run under the plan."""
        dead: list[int] = (self.gates.dead | (self.running_E == 0)).nonzero().flatten().tolist()
        return dead


class ModelUse(NamedTuple):
    """How a model uses its experts.

    Args:
        layers: of each routed layer, by name.
        selections: which experts run in each, under the plan.
        loss: cross entropy with all experts, in nats per token.
        plan_loss: cross entropy under the plan, in nats per token.
        active: active share under the plan.
    """

    layers: Mapping[str, RouterUse]
    selections: Mapping[str, Selection]
    loss: float
    plan_loss: float
    active: metrics.ActiveShare


@torch.inference_mode()
def utilization(
    model: SparseModel,
    plan: SelectionPlan,
    text: HeldOut,
    counts: metrics.ParameterCounts,
    frequent: FrequentTokens,
    on_batch: Callable[[], object] = lambda: None,
) -> ModelUse:
    """Run a text through a model twice: with all experts, and under a plan.

    Args:
        model: the model.
        plan: which experts run.
        text: the text.
        counts: parameter counts of the decoder that the model was compiled from.
        frequent: the tokens whose mean gates are measured.
        on_batch: called after each batch of the text.

    Raises:
        ValueError: if the plan is invalid for the model, or the model has no routed layer.
        FloatingPointError: if a loss is not finite.
    """
    check_mixtures(counts)
    selections = plan.selections(routed_layers(model.decoder))
    dense = SelectionPlan()
    row_V = frequent.rows(model.decoder.vocab_size).to(text.device)
    totals = {
        name: _RouterTotals(each.n_experts, len(frequent.numbers_U), text.device)
        for name, each in counts.layers.items()
    }
    active = metrics.ActiveSums(counts)
    losses = [0.0, 0.0]
    for inputs_BT, labels_BT in text.batches:
        mask_BT = labels_BT != IGNORED
        nll, routings = _read(model, dense, inputs_BT, labels_BT)
        plan_nll, plan_routings = _read(model, plan, inputs_BT, labels_BT)
        losses[0] += nll
        losses[1] += plan_nll
        running = metrics.active_masks(plan_routings, plan, model.decoder)
        active.add(running, mask_BT)
        for name, layer in routings.by_name().items():
            totals[name].update(layer.routing, running[name], mask_BT, row_V[inputs_BT])
        on_batch()
    layers = {name: total.compute(frequent.counts_U) for name, total in totals.items()}
    loss, plan_loss = (nll / text.n_tokens for nll in losses)
    if not math.isfinite(loss + plan_loss):
        raise FloatingPointError(f"the loss is {loss}, under the plan {plan_loss}")
    return ModelUse(layers, selections, loss, plan_loss, active.share())


def check_mixtures(counts: metrics.ParameterCounts) -> None:
    """Raise a ValueError if a decoder has no routed layer, or too many experts to count in pairs.

    Args:
        counts: of the decoder.
    """
    sizes = [each.n_experts for each in counts.layers.values()]
    if not sizes:
        raise ValueError("this model has no mixture of experts or of attention heads in any layer")
    if sum(n**2 for n in sizes) > _MOST_PAIRS:
        raise ValueError(
            f"this model has {sum(sizes)} experts, up to {max(sizes)} of a layer: more than "
            f"{_MOST_PAIRS} pairs to count"
        )


class _RouterTotals:
    """Sums over tokens of what one router gives."""

    def __init__(self, n_experts: int, n_frequent: int, device: torch.device) -> None:
        self.gates_E = torch.zeros(n_experts, device=device)
        self.entropies = torch.zeros((), device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        # In float32 a count would stop growing at 2**24 tokens.
        self.together_EE = torch.zeros(n_experts, n_experts, dtype=torch.float64, device=device)
        # The last row: all other tokens.
        self.token_gates_UE = torch.zeros(n_frequent + 1, n_experts, device=device)
        self.best: list[Tensor] = []

    def update(
        self, routing: Routing, running_BTE: Tensor, mask_BT: Tensor, row_BT: Tensor
    ) -> None:
        probs_NE = routing.probs[mask_BT].float()
        running_NE = running_BTE[mask_BT].float()
        gates_E, entropies, tokens = utilization_sums(probs_NE, None)
        self.gates_E += gates_E
        self.entropies += entropies
        self.tokens += tokens
        self.together_EE += running_NE.T @ running_NE
        self.token_gates_UE.index_add_(0, row_BT[mask_BT], probs_NE)
        # Kept for every token, to compare checkpoints; `check_mixtures` bounds E far below 2**15.
        self.best.append(probs_NE.argmax(-1).short())

    def compute(self, counts_U: Tensor) -> RouterUse:
        best_N = torch.cat(self.best)
        sums = self.gates_E.cpu(), self.entropies.cpu(), self.tokens.cpu()
        return RouterUse(
            utilization_of_sums(*sums, metrics.DEAD_SHARE),
            (self.together_EE / len(best_N)).cpu(),
            self.token_gates_UE[:-1].cpu() / counts_U[:, None],
            best_N.cpu(),
        )


def _read(
    model: SparseModel, plan: SelectionPlan, inputs_BT: Tensor, labels_BT: Tensor
) -> tuple[float, Routings]:
    """Loss summed over the tokens, and the routings; the logits, which are large, are freed."""
    logits_BTV, routings = model(inputs_BT, plan)
    return summed_cross_entropy(logits_BTV, labels_BT).item(), routings
