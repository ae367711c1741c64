"""Products with the rows of some experts, and 8-bit rows."""

import copy
import importlib
import sys

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant
from torch import Tensor

from lightning_dsmoe.inference.engine.weights.row_major import (
    Int8RowMajorWeights,
    RowMajorWeights,
    quantize_int8,
)

from ....pairwise import pairwise
from ..conftest import assert_near


def make(kind: str, size: tuple[int, int, int]) -> RowMajorWeights:
    rows = RowMajorWeights(torch.randn(size), transposed=False)
    if kind == "int8":
        return quantize_int8(rows)
    return rows.to(getattr(torch, kind))


def exact(rows: RowMajorWeights) -> Tensor:
    """The matrices in double precision."""
    if isinstance(rows, Int8RowMajorWeights):
        return rows.weight.double() * rows.scales.double()[..., None] / 127
    return rows.weight.double()


def numbers(rows: RowMajorWeights, chosen: list[int] | None) -> Tensor | None:
    return None if chosen is None else torch.tensor(chosen) % len(rows.weight)


@pytest.mark.parametrize(
    ("kind", "size", "chosen", "n_tokens"),
    pairwise(
        kind=["float32", "bfloat16", "int8", "float64"],
        size=[(5, 7, 3), (1, 1, 4), (3, 68, 5), (4, 66, 8), (2, 130, 1)],
        chosen=[None, [3], [0, 2, 4], [4, 1], [2, 2]],
        n_tokens=[1, 2, 3, 5],
    ),
)
def test_products(
    kind: str, size: tuple[int, int, int], chosen: list[int] | None, n_tokens: int
) -> None:
    rows = make(kind, size)
    experts = numbers(rows, chosen)
    matrices = exact(rows) if experts is None else exact(rows)[experts]
    half = kind in ("bfloat16", "int8")
    x_NI = torch.randn(n_tokens, size[2], dtype=torch.bfloat16 if half else rows.weight.dtype)
    shared = rows.project(x_NI, experts)
    expected = torch.einsum("ni,kri->knr", x_NI.double(), matrices)
    x_KNI = torch.randn(len(matrices), n_tokens, size[2], dtype=x_NI.dtype)
    summed = rows.project_and_sum(x_KNI, experts)
    expected_sum = torch.einsum("kni,kri->nr", x_KNI.double(), matrices)
    dtype = torch.float64 if kind == "float64" else torch.float32
    relative = 1e-14 if kind == "float64" else 1e-6
    assert_near(shared, expected.to(dtype), relative)
    assert_near(summed, expected_sum.to(dtype), relative)


@pytest.mark.parametrize(
    ("kind", "dtype", "size", "experts", "n_tokens"),
    pairwise(
        kind=["float", "int8"],
        dtype=[torch.float32, torch.float64, torch.bfloat16],
        size=[(5, 7, 3), (4, 68, 5), (4, 6, 9)],
        experts=[[3], [0, 1], [1, 3]],
        n_tokens=[1, 4, 12],
    ),
)
def test_products_of_many_tokens(
    kind: str, dtype: torch.dtype, size: tuple[int, int, int], experts: list[int], n_tokens: int
) -> None:
    rows = make("int8" if kind == "int8" else "float32", size).to(dtype)
    scales = rows.scales if isinstance(rows, Int8RowMajorWeights) else rows.weight
    scales[[e for e in range(size[0]) if e not in experts]] = torch.nan  # which are not read
    x_GMI = torch.randn(len(experts), n_tokens, size[2]).to(dtype)
    expected = torch.einsum("gmi,gri->gmr", x_GMI.double(), exact(rows)[experts])
    double = 1e-7 if kind == "int8" else 1e-14  # scales are float32
    bounds = {torch.float32: 1e-6, torch.float64: double, torch.bfloat16: 2e-2}
    assert_near(rows.products(x_GMI, experts), expected.to(dtype), bounds[dtype])


def test_products_do_not_overflow_in_float16() -> None:
    rows = Int8RowMajorWeights(
        torch.full((1, 2, 768), 127, dtype=torch.int8),
        torch.full((1, 2), 0.5),
        transposed=False,
        dtype=torch.float16,
    )
    x_GMI = torch.ones(1, 3, 768, dtype=torch.float16)
    assert_near(rows.products(x_GMI, [0]), torch.full((1, 3, 2), 384.0).half(), 1e-3)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_only_the_chosen_rows_are_read(kind: str) -> None:
    rows = make(kind, (5, 68, 6))
    x_NI, x_KNI, experts = torch.randn(2, 6), torch.randn(2, 2, 6), torch.tensor([1, 4])
    clean = rows.project(x_NI, experts), rows.project_and_sum(x_KNI, experts)
    poisoned = rows.scales if isinstance(rows, Int8RowMajorWeights) else rows.weight
    poisoned[[0, 2, 3]] = torch.nan
    assert torch.equal(rows.project(x_NI, experts), clean[0])
    assert torch.equal(rows.project_and_sum(x_KNI, experts), clean[1])
    assert rows.project(x_NI, None).isnan().any()


def test_rows_lie_side_by_side_in_memory() -> None:
    matrices = torch.randn(3, 4, 6)
    rows = RowMajorWeights(matrices.mT, transposed=True)
    assert rows.weight.shape == (3, 6, 4)
    assert rows.weight.is_contiguous()
    assert torch.equal(rows(), matrices)
    assert torch.equal(rows.of([2])[0], matrices[2])
    assert torch.equal(rows.rows(slice(None)), matrices.mT)
    assert torch.equal(RowMajorWeights(matrices, transposed=False)(), matrices)


@pytest.fixture
def matrices() -> Tensor:
    return torch.randn(3, 5, 8)


@pytest.fixture(params=[False, True], ids=["rows", "columns"])
def quantized(request: pytest.FixtureRequest, matrices: Tensor) -> Int8RowMajorWeights:
    return quantize(matrices, transposed=request.param)


def quantize(matrices: Tensor, *, transposed: bool) -> Int8RowMajorWeights:
    return quantize_int8(
        RowMajorWeights(matrices.mT if transposed else matrices, transposed=transposed)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_codes_and_scales_are_those_of_bitsandbytes(dtype: torch.dtype, matrices: Tensor) -> None:
    rows = quantize_int8(RowMajorWeights(matrices.to(dtype), transposed=False))
    codes, scales, _ = int8_vectorwise_quant(matrices.to(dtype).float().view(15, 8))
    assert rows.weight.dtype == torch.int8
    assert rows.scales.dtype == torch.float32
    assert torch.equal(rows.weight, codes.view(3, 5, 8))
    assert torch.equal(rows.scales, scales.view(3, 5))
    assert rows().dtype == dtype


def test_matrices_are_within_half_a_step(matrices: Tensor, quantized: Int8RowMajorWeights) -> None:
    steps = matrices.abs().amax(-2 if quantized.transposed else -1) / 127
    error = (quantized() - matrices).abs()
    half = steps.unsqueeze(-2 if quantized.transposed else -1) / 2
    assert (error <= half * 1.0001).all()
    assert error.max() > 0


def test_an_expert_alone_is_the_same_as_among_all(quantized: Int8RowMajorWeights) -> None:
    everything = quantized()
    assert everything.shape == (3, 5, 8)
    for expert, matrix in zip((2, 0), quantized.of([2, 0]), strict=True):
        assert torch.equal(matrix, everything[expert])


def test_an_expert_of_zeros_stays_zero(matrices: Tensor) -> None:
    matrices[1] = 0
    for transposed in (False, True):
        quantized = quantize(matrices, transposed=transposed)
        assert torch.equal(quantized.of([1])[0], torch.zeros(5, 8))
        assert quantized().isfinite().all()
        assert quantized.of([0])[0].any()


def test_small_weights_do_not_vanish_in_half_precision(quantized: Int8RowMajorWeights) -> None:
    quantized.scales.mul_(1e-5)
    expected = quantized()
    assert 1e-7 < expected.abs().max() < 1e-4
    found = quantized.to(torch.float16)()
    torch.testing.assert_close(found, expected.half(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_change_the_matrices_only(
    dtype: torch.dtype, quantized: Int8RowMajorWeights
) -> None:
    before = copy.deepcopy(quantized)
    quantized.to(dtype)
    assert quantized().dtype == quantized.of([0])[0].dtype == dtype
    torch.testing.assert_close(quantized().float(), before(), rtol=0.02, atol=0)
    for twin in (quantized, copy.deepcopy(quantized).float()):
        assert twin.weight.dtype == torch.int8
        assert torch.equal(twin.weight, before.weight)
        assert twin.scales.dtype == torch.float32
        assert torch.equal(twin.scales, before.scales)
    assert torch.equal(quantized.float()(), before())


def test_names_of_version_0_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lightning_dsmoe.inference.engine.rows", raising=False)
    with pytest.warns(DeprecationWarning, match="goes with version 0.3"):
        rows = importlib.import_module("lightning_dsmoe.inference.engine.rows")
    assert (rows.Rows, rows.Int8Rows) == (RowMajorWeights, Int8RowMajorWeights)
