"""Training against sparse dispatch as on a GPU, at toy sizes on the CPU."""

import pytest
import torch

from benchmarks.gpu import training
from benchmarks.gpu.sides import Models


def test_sparse_dispatch_takes_steps_beside_the_twin(
    tiny: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "peak_flops", lambda *_: 1e9)
    twin, dispatch = training._compare(
        tiny,
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


def test_the_square_of_attention_is_what_the_causal_half_leaves_out(tiny: Models) -> None:
    context, width, layers = 8, 4 * 8, 2
    parameters = sum(p.numel() for p in tiny.dense().parameters())
    half = training.operations_per_token(tiny.dense, context)
    square = training.attention_per_token(tiny.dense, context)
    assert square == 12 * layers * context * width == training.attention_per_token(tiny.sparse, 8)
    assert half == 6 * parameters + square * (context + 1) / (2 * context)
