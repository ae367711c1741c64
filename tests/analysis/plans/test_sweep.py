from functools import partial

import pytest

from lightning_dsmoe.analysis.plans.sweep import sweep_plans
from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import FeedForward, MixtureOfExperts


@pytest.mark.parametrize("n_experts", [1, 2, 18])
@pytest.mark.parametrize("n_attention_experts", [1, 8])
def test_all_plans_fit_the_model(n_experts: int, n_attention_experts: int) -> None:
    decoder = Decoder(
        5,
        8,
        1,
        attention=partial(
            MixtureOfAttentionHeads, n_experts=n_attention_experts, n_heads=1, d_head=4
        ),
        feed_forward=partial(MixtureOfExperts, n_experts=n_experts, d_expert=2),
    )
    plans = sweep_plans(decoder)
    for plan in plans.values():
        plan.check(*decoder.plan_sizes)
    assert ("threshold 1.5" in plans) == (min(n_experts, n_attention_experts) > 1)
    assert "threshold 0.75" in plans


def test_layers_without_a_router_run_whole() -> None:
    attention = partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=4)
    plans = sweep_plans(
        Decoder(5, 8, 1, attention=attention, feed_forward=partial(FeedForward, d_hidden=4))
    )
    assert {"all", "threshold 1.5", "all experts, top 3 attention"} <= set(plans)
    assert not any(name.endswith("all attention") for name in plans)
