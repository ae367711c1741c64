from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_dsmoe.analysis import frontier, knee, sweep_plans
from lightning_dsmoe.analysis.plans.frontier import frontier_figure
from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import FeedForward, MixtureOfExperts


def test_the_frontier_leaves_out_what_is_beaten() -> None:
    points = [(0.5, 1.2), (0.2, 1.5), (0.3, 1.5), (1.0, 1.1), (0.6, 1.3), (0.5, 1.25)]
    assert frontier(points) == [1, 0, 3]
    assert frontier([]) == []
    assert frontier([(0.5, 1.0), (0.5, 1.0)]) == [0]


def test_the_knee_is_where_the_curve_bends() -> None:
    points = [(1.0, 1.0), (0.1, 2.0), (0.2, 1.05), (0.5, 1.02), (0.15, 1.6), (0.3, 1.9)]
    assert knee(points) == 2
    steep = [(0.145, 1.6267), (0.146, 1.6235), (0.147, 1.6224), (0.148, 1.6223), (1.0, 1.6225)]
    assert knee(steep) == 3
    assert knee([(0.4, 1.0)]) == 0
    assert knee([(0.4, 1.0), (0.5, 1.0)]) == 0
    with pytest.raises(ValueError, match="no knee without points"):
        knee([])


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
        decoder.selections(plan)
    assert ("threshold 1.5" in plans) == (min(n_experts, n_attention_experts) > 1)
    assert "threshold 0.75" in plans


def test_layers_without_a_router_run_whole() -> None:
    attention = partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=4)
    plans = sweep_plans(
        Decoder(5, 8, 1, attention=attention, feed_forward=partial(FeedForward, d_hidden=4))
    )
    assert {"all", "threshold 1.5", "all experts, top 3 attention"} <= set(plans)
    assert not any(name.endswith("all attention") for name in plans)


def test_the_figure_names_the_knee_where_no_point_is() -> None:
    losses = {
        "all": (1.0, 1.0),
        "top 1": (0.1, 2.0),
        "top 2": (0.2, 1.05),
        "top-p 0.5": (0.5, 1.02),
    }
    results: Any = {
        name: SimpleNamespace(active_share_mean=share, loss=loss)
        for name, (share, loss) in losses.items()
    }
    [axes] = frontier_figure(results).axes
    _, labels = axes.get_legend_handles_labels()
    assert labels[-1] == "knee: top 2, 20.0 % active"
    assert not axes.texts
