"""Products with weights in tiles, and the decoder that has them."""

from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.inference.engine.weights import int8_words
from lightning_dsmoe.inference.engine.weights.int8_head import Int8Head
from lightning_dsmoe.inference.engine.weights.packing import tile_weights
from lightning_dsmoe.inference.engine.weights.row_major import (
    Int8RowMajorWeights,
    RowMajorWeights,
    quantize_int8,
)
from lightning_dsmoe.inference.engine.weights.tiled import TiledWeights

from ....pairwise import pairwise
from ..conftest import assert_near, packed


def make(kind: str, size: tuple[int, int, int]) -> RowMajorWeights:
    rows = RowMajorWeights(torch.randn(size), transposed=False)
    return quantize_int8(rows) if kind == "int8" else rows.to(getattr(torch, kind))


@pytest.mark.parametrize(
    ("kind", "size", "chosen", "n_tokens"),
    pairwise(
        kind=["float32", "bfloat16", "int8"],
        size=[(5, 7, 3), (5, 32, 4), (5, 24, 1), (5, 68, 6)],
        chosen=[None, [3], [0, 2, 4], [4, 1], [2, 2]],
        n_tokens=[1, 3, 8, 9, 16],
    ),
)
def test_products(
    kind: str, size: tuple[int, int, int], chosen: list[int] | None, n_tokens: int
) -> None:
    rows = make(kind, size)
    matrices = rows.weight.double()
    if isinstance(rows, Int8RowMajorWeights):
        matrices *= rows.scales.double()[..., None] / 127
    experts = None if chosen is None else torch.tensor(chosen)
    matrices = matrices if experts is None else matrices[experts]
    tiles = TiledWeights.of(rows)
    x_NI = torch.randn(n_tokens, size[2])
    x_NI = x_NI.to(torch.bfloat16) if kind == "bfloat16" else x_NI
    expected = torch.einsum("ni,kri->knr", x_NI.double(), matrices)
    assert_near(tiles.project(x_NI, experts), expected.float(), 1e-6)
    x_KNI = torch.randn(len(matrices), n_tokens, size[2]).to(x_NI.dtype)
    expected = torch.einsum("kni,kri->nr", x_KNI.double(), matrices)
    assert_near(tiles.project_and_sum(x_KNI, experts), expected.float(), 1e-6)


@pytest.mark.parametrize("n_tokens", [2, 12])
def test_only_the_chosen_experts_are_read(n_tokens: int) -> None:
    tiles = TiledWeights.of(make("float32", (5, 24, 6)))
    x_NI, x_KNI, experts = (
        torch.randn(n_tokens, 6),
        torch.randn(2, n_tokens, 6),
        torch.tensor([1, 4]),
    )
    clean = tiles.project(x_NI, experts), tiles.project_and_sum(x_KNI, experts)
    tiles.weight[[0, 2, 3]] = torch.nan
    assert torch.equal(tiles.project(x_NI, experts), clean[0])
    assert torch.equal(tiles.project_and_sum(x_KNI, experts), clean[1])


def addresses(decoder: Decoder) -> dict[str, int]:
    tensors = [*decoder.named_parameters(), *decoder.named_buffers()]
    return {name: tensor.data_ptr() for name, tensor in tensors}


@pytest.mark.parametrize("int8", [False, True])
def test_a_decoder_in_tiles_shares_all_other_weights(
    int8: bool, decoder: Decoder, tokens: Tensor
) -> None:
    twin = packed(decoder, int8=int8)
    before, expected = addresses(twin), twin(tokens).logits
    copied = tile_weights(twin, 2)
    copies = {name for name, module in copied.named_modules() if isinstance(module, TiledWeights)}
    rows = {name for name, module in twin.named_modules() if isinstance(module, RowMajorWeights)}
    assert copies == {name for name in rows if name != "head.rows"}
    assert isinstance(copied.head, Int8Head) == int8
    for name, address in addresses(copied).items():
        module, _, tensor = name.rpartition(".")
        seen_as = f"{module}.weight" if tensor == "words" else name  # codes, as words
        padded = tensor == "words" and copied.d_model % 4  # rows that are not whole words
        assert module in copies or padded or address == before[seen_as], name
    assert addresses(twin) == before
    assert torch.equal(twin(tokens).logits, expected)


@pytest.mark.parametrize("words", [False, True])
def test_one_token_has_tiles_for_8_bits_and_short_rows_only(
    words: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_words, "reads_words", lambda: words)
    wide = partial(MixtureOfExperts, n_experts=3, d_expert=64)
    heads = partial(MixtureOfAttentionHeads, n_experts=2, n_heads=4, d_head=16)
    decoder = Decoder(9, 64, 1, attention=heads, feed_forward=wide)
    twin = packed(decoder)
    assert tile_weights(twin, 1) is twin
    codes = tile_weights(packed(decoder, int8=True), 1).blocks[0]
    kind = Int8RowMajorWeights if words else TiledWeights  # codes in words gain nothing from tiles
    assert isinstance(codes.feed_forward.experts.w_in, kind)
    assert isinstance(codes.attention.heads.w_o, kind)
    small = Decoder(9, 64, 1, attention=heads, feed_forward=partial(wide, d_expert=16))
    layout = tile_weights(packed(small), 1).blocks[0]
    assert isinstance(layout.feed_forward.experts.w_in, RowMajorWeights)
    assert isinstance(layout.feed_forward.experts.w_out, TiledWeights)
    assert isinstance(layout.attention.heads.w_q, RowMajorWeights)
