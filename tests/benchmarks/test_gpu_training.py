"""Training against sparse dispatch as on a GPU, at toy sizes on the CPU."""

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.gpu import sides, training
from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts, SelectionPlan, TopK
from lightning_dsmoe.attention import GroupedQueryAttention
from lightning_dsmoe.experts import FeedForward


def make(attention: Any, feed_forward: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(32, 16, 2, attention=attention, feed_forward=feed_forward)


TINY = sides.Models(
    "tiny",
    partial(
        make,
        partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=8),
        partial(MixtureOfExperts, n_experts=4, d_expert=8),
    ),
    partial(
        make,
        partial(GroupedQueryAttention, n_heads=4, n_kv_heads=1, d_head=8),
        partial(FeedForward, d_hidden=32),
    ),
    {"P": SelectionPlan(experts=TopK(2), attention=TopK(1))},
)


def test_sparse_dispatch_takes_steps_beside_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "peak_flops", lambda *_: 1e9)
    twin, dispatch = training._compare(
        TINY,
        training.DISPATCH,
        torch.device("cpu"),
        context=8,
        batch_sizes=(2,),
        compiled=False,
        rounds=1,
        until=0,
    )
    assert [twin["side"], dispatch["side"]] == ["dense twin", "sparse dispatch"]
    assert "error" not in dispatch
    # Two of four experts run: less work, in two small products of four tokens.
    per_token = [row["TFLOP/s"] / row["tokens/s"] for row in (twin, dispatch)]
    assert per_token[1] < per_token[0]
    for row in (twin, dispatch):
        assert row["MFU, square"] > row["MFU"] == pytest.approx(1e3 * row["TFLOP/s"])


def test_the_square_of_attention_is_what_the_causal_half_leaves_out() -> None:
    context, width, layers = 8, 4 * 8, 2
    parameters = sum(p.numel() for p in TINY.dense().parameters())
    half = training.operations_per_token(TINY.dense, context)
    square = training.attention_per_token(TINY.dense, context)
    assert square == 12 * layers * context * width == training.attention_per_token(TINY.sparse, 8)
    assert half == 6 * parameters + square * (context + 1) / (2 * context)
