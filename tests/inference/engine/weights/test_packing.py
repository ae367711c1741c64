"""Repacking a decoder: which weights change their form, and that nothing else does."""

import copy
import sys
from typing import Any

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant
from torch import Tensor
from torch.nn import functional as F

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.engine.weights.int8_head import Int8Head
from lightning_dsmoe.inference.engine.weights.packing import pack, pack_empty, quantized_bytes
from lightning_dsmoe.inference.engine.weights.row_major import Int8RowMajorWeights, RowMajorWeights
from lightning_dsmoe.routing import Threshold, TopK

from ..conftest import MakeDecoder, V, assert_near, rotary_mlp, uniform, without_routers

WEIGHTS = {
    "feed_forward.experts.w_in": False,
    "feed_forward.experts.w_out": True,
    "attention.heads.w_q": False,
    "attention.heads.w_o": True,
}
SHARED = {"feed_forward.shared.experts.w_in": False, "feed_forward.shared.experts.w_out": True}
ROUTED = sorted(f"blocks.{n}.{name}" for n in range(2) for name in WEIGHTS)


def names_of(decoder: Decoder) -> dict[str, bool]:
    """Names of all stacked weights, and whether their columns are packed."""
    shared = getattr(decoder.blocks[0].feed_forward, "shared", None)
    names = WEIGHTS | ({} if shared is None else SHARED)
    return {f"blocks.{n}.{name}": columns for n in range(2) for name, columns in names.items()}


def test_rows_are_packed_as_they_are_read(decoder: Decoder) -> None:
    before = copy.deepcopy(decoder)
    pack(decoder)
    packed = {name for name, m in decoder.named_modules() if isinstance(m, RowMajorWeights)}
    assert packed == set(names_of(decoder))
    for name, transposed in names_of(decoder).items():
        matrices = before.get_submodule(name).weight.detach()
        found = decoder.get_submodule(name)
        assert type(found) is RowMajorWeights
        assert torch.equal(found.weight, matrices.mT if transposed else matrices)
        assert found.weight.is_contiguous()
        assert torch.equal(found(), matrices)
    assert quantized_bytes(decoder) == {}


def test_the_packed_decoder_computes_what_it_did(decoder: Decoder, tokens: Tensor) -> None:
    plans = [None, uniform(TopK(2)), uniform(Threshold(0.8))]
    expected = [decoder(tokens, plan).logits for plan in plans]
    pack(decoder)
    for plan, logits in zip(plans, expected, strict=True):
        assert_near(decoder(tokens, plan).logits, logits)


@pytest.mark.parametrize("int8", [False, True])
def test_the_rest_of_the_model_stays(decoder: Decoder, int8: bool) -> None:
    before = {name: p.clone() for name, p in decoder.state_dict().items()}
    pack(decoder, quantization="int8" if int8 else None)
    after = decoder.state_dict()
    quantized = quantized_bytes(decoder)
    assert after.keys() - before.keys() == {f"{name}.scales" for name in quantized}
    assert not before.keys() - after.keys()
    packed = {f"{name}.weight" for name in names_of(decoder)}
    for name in before.keys() - packed:
        assert torch.equal(after[name], before[name]), name


def test_codes_and_scales_are_those_of_bitsandbytes(make_decoder: MakeDecoder) -> None:
    before, decoder = make_decoder(), make_decoder()
    pack(decoder, quantization="int8", quantize_head=True)
    expected = ["head.rows", *(ROUTED if make_decoder is not without_routers else [])]
    assert sorted(quantized_bytes(decoder)) == sorted(expected)
    for name in expected:
        if name == "head.rows":
            rows = before.head.weight.detach()[None]
        else:
            matrices = before.get_submodule(name).weight.detach()
            rows = matrices.mT if WEIGHTS[name.split(".", 2)[2]] else matrices
        codes, scales, _ = int8_vectorwise_quant(rows.reshape(-1, rows.shape[-1]))
        found = decoder.get_submodule(name)
        assert isinstance(found, Int8RowMajorWeights)
        assert found.weight.dtype == torch.int8
        assert found.scales.dtype == torch.float32
        assert torch.equal(found.weight, codes.view(rows.shape))
        assert torch.equal(found.scales, scales.view(rows.shape[:-1]))
        assert torch.equal(found.scales, rows.abs().amax(-1))


def test_shared_experts_stay_in_full() -> None:
    decoder = rotary_mlp()
    pack(decoder, quantization="int8")
    for name in SHARED:
        assert type(decoder.get_submodule(f"blocks.0.{name}")) is RowMajorWeights


def test_a_model_without_routers_has_nothing_to_quantise() -> None:
    decoder = without_routers()
    pack(decoder, quantization="int8")
    assert quantized_bytes(decoder) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_eight_bit_head_leaves_the_embeddings(dtype: torch.dtype, decoder: Decoder) -> None:
    decoder = decoder.to(dtype)
    embedding, weight = decoder.embedding.weight.clone(), decoder.head.weight.clone()
    pack(decoder, quantize_head=True)
    assert isinstance(decoder.head, Int8Head)
    assert not decoder.tie_embeddings
    assert list(quantized_bytes(decoder)) == ["head.rows"]
    assert torch.equal(decoder.embedding.weight, embedding)
    rows = decoder.head.rows.rows(0)
    assert rows.shape == (V, decoder.d_model)
    steps = weight.float().abs().amax(-1, keepdim=True) / 127
    assert ((rows - weight).float().abs() <= steps * (0.51 if dtype == torch.float32 else 1)).all()
    x = torch.randn(2, 3, decoder.d_model, dtype=dtype)
    logits = decoder.head(x)
    assert torch.equal(logits, F.linear(x, rows))
    few = decoder.head.matvec(x[0])
    assert_near(few, logits[0], 1e-6 if dtype == torch.float32 else 1e-2)
    decoder.double()
    assert decoder.head(x.double()).dtype == torch.float64
    assert decoder.head.rows.scales.dtype == torch.float32


def test_a_model_in_half_precision_runs_in_it(decoder: Decoder, tokens: Tensor) -> None:
    expected = decoder(tokens).logits
    for late in (False, True):
        twin = copy.deepcopy(decoder)
        twin = twin if late else twin.bfloat16()
        pack(twin, quantization="int8", quantize_head=True)
        logits = twin.bfloat16()(tokens).logits
        assert logits.dtype == torch.bfloat16
        assert (logits - expected).abs().mean() < 0.1 * expected.std()


@pytest.mark.parametrize(
    "options",
    [
        {"quantization": None, "quantize_head": False},
        {"quantization": "int8", "quantize_head": False},
        {"quantization": None, "quantize_head": True},
        {"quantization": "int8", "quantize_head": True},
    ],
    ids=["float", "experts", "head", "both"],
)
def test_the_empty_weights_expected_are_those_that_packing_gives(
    options: dict[str, Any], make_decoder: MakeDecoder, tokens: Tensor
) -> None:
    decoder = make_decoder()
    pack(decoder, **options)
    state = decoder.state_dict()
    with torch.device("meta"):
        empty = make_decoder()
    pack_empty(empty, dtype=torch.float32, **options)
    expected = empty.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in expected.items()} == {
        n: (t.shape, t.dtype) for n, t in state.items()
    }
    assert all(tensor.is_meta for tensor in expected.values())
    assert empty.tie_embeddings == decoder.tie_embeddings
    empty.load_state_dict(state, assign=True)
    for plan in (uniform(TopK(2)), None):
        assert torch.equal(empty(tokens, plan).logits, decoder(tokens, plan).logits)


def test_bytes_by_name() -> None:
    decoder = rotary_mlp()
    assert quantized_bytes(decoder) == {}
    pack(decoder, quantization="int8", quantize_head=True)
    found = quantized_bytes(decoder)
    order = [name for name, _ in decoder.named_modules()]
    assert list(found) == sorted(found, key=order.index)
    assert found["blocks.1.feed_forward.experts.w_in"] == 5 * 20 * 48 + 4 * 5 * 20
    assert found["blocks.1.feed_forward.experts.w_out"] == 5 * 20 * 48 + 4 * 5 * 48
    assert found["blocks.0.attention.heads.w_q"] == 3 * 16 * 48 + 4 * 3 * 16
    assert found["blocks.0.attention.heads.w_o"] == 3 * 16 * 48 + 4 * 3 * 48
    assert found["head.rows"] == V * 48 + 4 * V


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"quantize_head": True}], ids=str)
def test_without_bitsandbytes(
    options: dict[str, Any], one_decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    before = one_decoder.state_dict().keys()
    with pytest.raises(ImportError, match="8-bit weights need bitsandbytes: pip install"):
        pack(one_decoder, **options)
    assert one_decoder.state_dict().keys() == before
    pack(one_decoder)
