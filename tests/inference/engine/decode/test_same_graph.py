"""Which blocks share a kernel."""

from functools import partial
from typing import Any

import pytest
import torch

from lightning_dsmoe.attention import GroupedQueryAttention, LinearRopeScaling
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import MLPExperts
from lightning_dsmoe.inference.engine.decode.same_graph import kinds_of
from lightning_dsmoe.inference.engine.decode.step import BlockStep, EmbedStep
from lightning_dsmoe.routing import AllExperts, TopK

from ..conftest import FEED_FORWARD, packed

HEADS = partial(GroupedQueryAttention, n_heads=4, n_kv_heads=4, d_head=4)


def steps(changes: list[dict[str, Any]], **options: Any) -> list[BlockStep]:
    attention = [partial(HEADS, **{**options, **change}) for change in changes]
    made = Decoder(9, 16, len(changes), attention=attention, feed_forward=FEED_FORWARD)
    return [BlockStep(block, TopK(2), AllExperts()) for block in packed(made).blocks]


@pytest.mark.parametrize(
    "change",
    [
        {"n_heads": 2, "n_kv_heads": 2, "d_head": 8},  # weights of the same shapes
        {"norm_eps": 0.5},
        {"bias": True},
        {"rope_theta": None},
        {"rope_scaling": LinearRopeScaling(2.0)},
        {"rotary_fraction": 0.5},
        {"qk_norm": "projection"},
    ],
    ids=str,
)
def test_blocks_of_other_options_do_not(change: dict[str, Any]) -> None:
    assert kinds_of(steps([{}, change, {}, change], qk_norm=True)) == [0, 1, 0, 1]


def test_blocks_that_differ_in_weights_alone_do() -> None:
    scalings = [{"rope_scaling": LinearRopeScaling(2.0)} for _ in range(3)]
    assert kinds_of(steps(scalings)) == [0, 0, 0]


def test_blocks_under_other_selections_or_activations_do_not() -> None:
    relu = partial(FEED_FORWARD, experts=partial(MLPExperts, activation="relu"))
    made = Decoder(9, 16, 3, attention=HEADS, feed_forward=[FEED_FORWARD, relu, FEED_FORWARD])
    selections = [TopK(2), TopK(2), TopK(1)]
    blocks = [
        BlockStep(block, selection, AllExperts())
        for block, selection in zip(packed(made).blocks, selections, strict=True)
    ]
    assert kinds_of(blocks) == [0, 1, 2]


def test_angles_are_computed_once_for_blocks_that_share_them() -> None:
    changes = [{}, {"rope_theta": None}, {"rotary_fraction": 0.5}, {}]
    attention = [partial(HEADS, **change) for change in changes]
    embed = EmbedStep(Decoder(9, 16, 4, attention=attention, feed_forward=FEED_FORWARD))
    _, *angles = embed(torch.tensor([3, 4]), torch.ones(5, 2, dtype=torch.bool))
    assert [each.shape for each in angles] == [(2, 1, 4)] * 2 + [(2, 1, 2)] * 2
    assert [len(angles[own]) for own in embed.angles_of] == [2, 0, 2, 2]
    assert angles[embed.angles_of[0]][0] is angles[embed.angles_of[3]][0]
    assert angles[embed.angles_of[2]][0].shape[-1] == 2
