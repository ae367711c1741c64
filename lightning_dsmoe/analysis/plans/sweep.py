"""Many plans of one model, from very sparse to dense."""

from collections.abc import Sequence

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.routing import (
    AllExperts,
    Selection,
    SelectionPlan,
    Threshold,
    ThresholdTopK,
    TopK,
    TopP,
)

EPS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5)
P = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
NUMBERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def sweep_plans(decoder: Decoder) -> dict[str, SelectionPlan]:
    """Plans by name: dense; then fixed numbers, thresholds and probabilities.

    The same selection runs in both kinds of experts, and then fixed numbers and thresholds in one
    kind alone, all experts of the other running.

    Args:
        decoder: the model; layers without a router run whole.
    """
    n_experts, n_attention = decoder.plan_sizes
    plans = {"all": SelectionPlan.uniform(decoder.n_layers)}

    def add(name: str, experts: Selection, attention: Selection) -> None:
        plans[name] = SelectionPlan.uniform(decoder.n_layers, experts=experts, attention=attention)

    few, few_heads = _numbers(n_experts), _numbers(n_attention)
    for place, k in enumerate(few):
        k_heads = few_heads[min(place, len(few_heads) - 1)] if few_heads else 1
        add(f"top {k} and {k_heads}", TopK(k), TopK(k_heads))
    least = min((n for n in n_experts + n_attention if n is not None), default=0)
    for eps in (eps for eps in EPS if eps < least):
        add(f"threshold {eps:g}", Threshold(eps), Threshold(eps))
        add(f"threshold top-k {eps:g}", ThresholdTopK(eps), ThresholdTopK(eps))
    for p in P:
        add(f"top-p {p:g}", TopP(p), TopP(p))
    for k in few:
        add(f"top {k}, all attention", TopK(k), AllExperts())
    for k in few_heads:
        add(f"all experts, top {k} attention", AllExperts(), TopK(k))
    return plans


def _numbers(counts: Sequence[int | None]) -> list[int]:
    """Numbers of experts that are fewer than those of any layer with a router."""
    least = min((count for count in counts if count is not None), default=0)
    return [number for number in NUMBERS if number < least]
