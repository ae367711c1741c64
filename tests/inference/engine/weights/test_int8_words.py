"""Products with codes of 8 bits read as words, against matrices dequantized in double precision."""

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.inference.engine.weights import int8_words
from lightning_dsmoe.inference.engine.weights.int8_head import Int8Head
from lightning_dsmoe.inference.engine.weights.row_major import (
    Int8RowMajorWeights,
    RowMajorWeights,
    quantize_int8,
)
from lightning_dsmoe.inference.engine.weights.tiled import TiledWeights

from ....pairwise import pairwise
from ..conftest import assert_near


def quantized(size: tuple[int, int, int]) -> Int8RowMajorWeights:
    return quantize_int8(RowMajorWeights(torch.randn(size), transposed=False))


def exact(rows: Int8RowMajorWeights) -> Tensor:
    return rows.weight.double() * rows.scales.double()[..., None] / 127


def test_a_word_holds_four_codes_in_order() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8).view(4, 64)
    parts = int8_words.parts_of(int8_words.words_of(codes).view(torch.int32))
    assert torch.equal(torch.stack(parts, -1).flatten(1), codes.int())


def test_words_share_the_memory_of_codes_where_rows_are_whole_words() -> None:
    codes = torch.zeros(3, 8, dtype=torch.int8)
    assert int8_words.words_of(codes).data_ptr() == codes.data_ptr()
    shifted = torch.arange(17, dtype=torch.int8)[1:].view(2, 8)
    for odd in (shifted, shifted[:, :7]):
        parts = int8_words.parts_of(int8_words.words_of(odd).view(torch.int32))
        found = torch.stack(parts, -1).flatten(1)
        assert torch.equal(found[:, : odd.shape[1]], odd.int())
        assert not found[:, odd.shape[1] :].any()


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(
    ("size", "chosen", "n_tokens", "dtype"),
    pairwise(
        size=[(5, 7, 3), (5, 32, 4), (5, 24, 1), (5, 68, 6), (5, 33, 66)],
        chosen=[None, [3], [0, 2, 4], [4, 1], [2, 2]],
        n_tokens=[1, 2, 3, 8, 9, 16],
        dtype=[torch.float32, torch.bfloat16, torch.float16],
    ),
)
def test_products(
    tiled: bool,
    size: tuple[int, int, int],
    chosen: list[int] | None,
    n_tokens: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(int8_words, "reads_words", lambda: True)
    rows = quantized(size)
    experts = None if chosen is None else torch.tensor(chosen)
    matrices = exact(rows) if experts is None else exact(rows)[experts]
    weights = TiledWeights.of(rows) if tiled else rows.in_words()
    x_NI = torch.randn(n_tokens, size[2]).to(dtype)
    expected = torch.einsum("ni,kri->knr", x_NI.double(), matrices)
    assert_near(weights.project(x_NI, experts), expected.float(), 1e-6)
    x_KNI = torch.randn(len(matrices), n_tokens, size[2]).to(dtype)
    expected = torch.einsum("kni,kri->nr", x_KNI.double(), matrices)
    assert_near(weights.project_and_sum(x_KNI, experts), expected.float(), 1e-6)


def test_only_words_of_the_chosen_experts_are_read() -> None:
    rows = quantized((5, 24, 6))
    words = rows.in_words()
    assert words.words is not None
    x_NI, experts = torch.randn(2, 6), torch.tensor([1, 4])
    clean = words.project(x_NI, experts)
    words.words[[0, 2, 3]] = torch.nan
    assert torch.equal(words.project(x_NI, experts), clean)
    words.words[1] = torch.nan
    assert not torch.equal(words.project(x_NI, experts), clean)


def test_a_head_in_words_gives_the_logits_of_its_rows() -> None:
    rows = quantized((1, 29, 10))
    x_ND = torch.randn(3, 10)
    expected = x_ND.double() @ exact(rows)[0].T
    assert_near(Int8Head(rows.in_words()).matvec(x_ND), expected.float(), 1e-6)
    assert_near(Int8Head(rows.in_words())(x_ND), expected.float(), 1e-6)


@pytest.mark.parametrize(
    ("capability", "simdlen", "words"),
    [
        ("AVX2", None, True),
        ("AVX512", None, False),
        ("AVX512", 256, True),
        ("DEFAULT", None, False),
    ],
)
def test_words_are_for_kernels_made_for_avx2(
    capability: str, simdlen: int | None, words: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with torch._inductor.config.patch({"cpp.simdlen": simdlen}):
        assert int8_words.reads_words() == words
