"""8-bit expert weights: exact codes, and nothing else touched."""

import copy
import sys

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.quantization import (
    Int8StackedWeight,
    expect_int8,
    quantize_experts,
    quantize_int8,
    quantized_bytes,
)
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.stacked import StackedWeight

from .conftest import MakeDecoder, without_routers

WEIGHTS = {
    "feed_forward.experts.w_in": False,
    "feed_forward.experts.w_out": True,
    "attention.heads.w_q": False,
    "attention.heads.w_o": True,
}


@pytest.fixture
def weight() -> StackedWeight:
    return StackedWeight(3, 5, 8, fan_in=8)


@pytest.fixture(params=[False, True], ids=["rows", "columns"])
def quantized(request: pytest.FixtureRequest, weight: StackedWeight) -> Int8StackedWeight:
    return quantize_int8(weight, transposed=request.param)


def test_codes_and_scales_are_those_of_bitsandbytes(decoder: Decoder) -> None:
    before = copy.deepcopy(decoder)
    names = quantize_experts(decoder)
    assert sorted(names) == sorted(f"blocks.{n}.{name}" for n in range(2) for name in WEIGHTS)
    for name in names:
        matrices = before.get_submodule(name).weight.detach()
        rows = matrices.mT if WEIGHTS[name.split(".", 2)[2]] else matrices
        codes, scales, _ = int8_vectorwise_quant(rows.reshape(-1, rows.shape[-1]))
        found = decoder.get_submodule(name)
        assert found.codes.dtype == torch.int8
        assert found.scales.dtype == torch.float32
        assert torch.equal(found.codes, codes.view(rows.shape))
        assert torch.equal(found.scales, scales.view(rows.shape[:-1]))
        assert torch.equal(found.scales, rows.abs().amax(-1))


def test_the_rest_of_the_model_stays(decoder: Decoder) -> None:
    before = {name: p.clone() for name, p in decoder.state_dict().items()}
    names = quantize_experts(decoder)
    after = decoder.state_dict()
    codes = {f"{name}.{kind}" for name in names for kind in ("codes", "scales")}
    assert after.keys() - before.keys() == codes
    assert before.keys() - after.keys() == {f"{name}.weight" for name in names}
    for name in before.keys() & after.keys():
        assert torch.equal(after[name], before[name]), name
    assert not any("router" in name or "shared" in name or "kv" in name for name in names)


def test_a_model_without_routers_has_nothing_to_quantise() -> None:
    decoder = without_routers()
    before = decoder.state_dict().keys()
    assert quantize_experts(decoder) == []
    assert decoder.state_dict().keys() == before
    assert quantized_bytes(decoder) == {}


def test_matrices_are_within_half_a_step(
    weight: StackedWeight, quantized: Int8StackedWeight
) -> None:
    exact = weight().detach()
    steps = exact.abs().amax(-2 if quantized.transposed else -1) / 127
    error = (quantized() - exact).abs()
    half = steps.unsqueeze(-2 if quantized.transposed else -1) / 2
    assert (error <= half * 1.0001).all()
    assert error.max() > 0


def test_an_expert_alone_is_the_same_as_among_all(quantized: Int8StackedWeight) -> None:
    everything = quantized()
    assert everything.shape == (3, 5, 8)
    for expert, matrix in zip((2, 0), quantized.of([2, 0]), strict=True):
        assert torch.equal(matrix, everything[expert])


def test_an_expert_of_zeros_stays_zero(weight: StackedWeight) -> None:
    with torch.no_grad():
        weight.weight[1] = 0
    for transposed in (False, True):
        quantized = quantize_int8(weight, transposed=transposed)
        assert torch.equal(quantized.of([1])[0], torch.zeros(5, 8))
        assert quantized().isfinite().all()
        assert quantized.of([0])[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_change_the_matrices_only(
    dtype: torch.dtype, quantized: Int8StackedWeight
) -> None:
    before = copy.deepcopy(quantized)
    quantized.to(dtype)
    assert quantized().dtype == quantized.of([0])[0].dtype == dtype
    torch.testing.assert_close(quantized().float(), before(), rtol=0.02, atol=0)
    for twin in (quantized, copy.deepcopy(quantized).float()):
        assert twin.codes.dtype == torch.int8
        assert torch.equal(twin.codes, before.codes)
        assert twin.scales.dtype == torch.float32
        assert torch.equal(twin.scales, before.scales)
    assert torch.equal(quantized.float()(), before())


def test_a_model_in_half_precision_runs_in_it(decoder: Decoder, tokens: Tensor) -> None:
    expected = decoder(tokens).logits
    for late in (False, True):
        twin = copy.deepcopy(decoder)
        twin = twin if late else twin.bfloat16()
        quantize_experts(twin)
        logits = twin.bfloat16()(tokens).logits
        assert logits.dtype == torch.bfloat16
        assert (logits - expected).abs().mean() < 0.1 * expected.std()


def test_the_empty_weights_expected_are_those_that_quantising_gives(
    make_decoder: MakeDecoder, tokens: Tensor, plan: SelectionPlan
) -> None:
    decoder = make_decoder()
    quantize_experts(decoder)
    state = decoder.state_dict()
    with torch.device("meta"):
        empty = make_decoder()
    expect_int8(empty, dtype=torch.float32)
    expected = empty.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in expected.items()} == {
        n: (t.shape, t.dtype) for n, t in state.items()
    }
    assert all(tensor.is_meta for tensor in expected.values())
    empty.load_state_dict(state, assign=True)
    for some in (plan, None):
        assert torch.equal(empty(tokens, some).logits, decoder(tokens, some).logits)


def test_bytes_by_name(decoder: Decoder) -> None:
    assert quantized_bytes(decoder) == {}
    names = quantize_experts(decoder)
    found = quantized_bytes(decoder)
    assert list(found) == [name for name, _ in decoder.named_modules() if name in names]
    d_model, heads = decoder.d_model, decoder.blocks[0].attention.n_heads
    rows = 12 if d_model == 16 else 6  # GLU experts of 6 units have two projections of each
    assert found["blocks.1.feed_forward.experts.w_in"] == 4 * rows * d_model + 4 * (4 * rows)
    assert found["blocks.1.feed_forward.experts.w_out"] == 4 * 6 * d_model + 4 * (4 * d_model)
    head_rows = 4 * heads
    assert found["blocks.0.attention.heads.w_q"] == 3 * head_rows * d_model + 4 * (3 * head_rows)
    assert found["blocks.0.attention.heads.w_o"] == 3 * head_rows * d_model + 4 * (3 * d_model)


def test_without_bitsandbytes(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    before = decoder.state_dict().keys()
    with pytest.raises(ImportError, match="8-bit experts need bitsandbytes: pip install"):
        quantize_experts(decoder)
    assert decoder.state_dict().keys() == before
