"""The Triton kernel against a loop over slots: on a GPU, or in Triton's interpreter without one."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.inference.engine.decode_cuda.expert_slots import ExpertSlots, all_slots
from lightning_dsmoe.inference.engine.decode_cuda.products import SUMS, Products
from lightning_dsmoe.inference.engine.decode_cuda.step import CudaStep
from lightning_dsmoe.inference.engine.weights.row_major import (
    RowMajorWeights,
    quantize_int8,
)
from lightning_dsmoe.routing import Selection

from ....pairwise import pairwise
from ..conftest import (
    DECODERS,
    SELECTIONS,
    MakeDecoder,
    V,
    assert_near,
    packed,
    token_by_token,
    uniform,
)
from .test_step import in_steps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

SIZES = [(1, 1), (8, 16), (40, 20), (33, 70), (130, 600)]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def triton_products() -> ModuleType:
    from lightning_dsmoe.inference.engine.decode_cuda import triton_products as module

    if DEVICE == "cpu":  # the interpreter multiplies blocks of bfloat16 as if they were integers
        module._factor_dtype = lambda *_: torch.float32
    return module


def made(
    size: tuple[int, int], n_tokens: int, n_active: int, dtype: torch.dtype, int8: bool
) -> tuple[RowMajorWeights, Tensor, Tensor, ExpertSlots]:
    n_slots, n_experts, (n_rows, n_columns) = 5, 7, size
    weights = RowMajorWeights(torch.randn(n_experts, n_rows, n_columns), transposed=False).to(dtype)
    weights = (quantize_int8(weights) if int8 else weights).to(DEVICE)
    experts_K = torch.tensor([1, 2, 4, 5, 6]).clamp_max([1, 2, 4, 5, 6][n_active - 1])
    gates_KB = torch.rand(n_slots, n_tokens) * (torch.arange(n_slots) < n_active)[:, None]
    slots = ExpertSlots(experts_K, gates_KB, torch.tensor([n_active]))
    slots = ExpertSlots(*(each.to(DEVICE) for each in slots))
    x_BI = torch.randn(n_tokens, n_columns).to(DEVICE, dtype)
    x_KBI = torch.randn(n_slots, n_tokens, n_columns).to(DEVICE) * slots.gates_KB[..., None]
    return weights, x_BI, x_KBI, slots


@pytest.mark.parametrize(
    ("size", "n_tokens", "n_active", "dtype", "int8"),
    pairwise(
        size=SIZES,
        n_tokens=[1, 2, 7, 16],
        n_active=[1, 3, 5],
        dtype=list(ROUNDING),
        int8=[False, True],
    ),
)
def test_products_are_those_of_a_loop(
    triton_products: ModuleType,
    size: tuple[int, int],
    n_tokens: int,
    n_active: int,
    dtype: torch.dtype,
    int8: bool,
) -> None:
    weights, x_BI, x_KBI, slots = made(size, n_tokens, n_active, dtype, int8)
    exact = weights.weight.double()
    if int8:
        exact = exact * weights.scales.double()[..., None] / 127
    used = slots.experts_K[:n_active].tolist()
    projected_KBR = triton_products.project(weights, x_BI, slots)
    assert projected_KBR.dtype == torch.float32
    expected_KBR = torch.stack([x_BI.double() @ exact[e].T for e in used])
    assert_near(projected_KBR[:n_active], expected_KBR.float(), ROUNDING[dtype])
    assert not projected_KBR[n_active:].any()
    summed_BR = triton_products.project_and_sum(weights, x_KBI, slots)
    expected_BR = sum(x_KBI[k].double() @ exact[e].T for k, e in enumerate(used))
    assert_near(summed_BR, expected_BR.float(), ROUNDING[dtype])
    assert torch.equal(summed_BR, triton_products.project_and_sum(weights, x_KBI, slots))
    exact_sums = SUMS.project_and_sum(weights, x_KBI, slots)
    assert_near(summed_BR, exact_sums, ROUNDING[dtype])


@pytest.mark.parametrize("n_tokens", [1, 3])
@pytest.mark.parametrize("programs", [1, 2, 512])
def test_unused_experts_are_not_read(
    triton_products: ModuleType, n_tokens: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_products, "_PROGRAMS", programs)
    weights, x_BI, x_KBI, slots = made((40, 20), n_tokens, 3, torch.float32, False)
    expected = SUMS.project(weights, x_BI, slots), SUMS.project_and_sum(weights, x_KBI, slots)
    # Slots of other experts than those that run: whoever reads one shows it.
    slots = slots._replace(experts_K=torch.tensor([1, 2, 4, 0, 3], device=DEVICE))
    weights.weight[[0, 3, 5, 6]] = torch.nan
    assert_near(triton_products.project(weights, x_BI, slots)[:3], expected[0][:3])
    assert_near(triton_products.project_and_sum(weights, x_KBI, slots), expected[1])


def test_every_slot(triton_products: ModuleType) -> None:
    weights, x_BI, x_KBI, _ = made((33, 70), 2, 5, torch.float32, False)
    slots = all_slots(torch.ones(7, 2, device=DEVICE))
    x_7BI = torch.cat([x_KBI, x_KBI[:2]])
    assert_near(triton_products.project(weights, x_BI, slots), SUMS.project(weights, x_BI, slots))
    found = triton_products.project_and_sum(weights, x_7BI, slots)
    assert_near(found, SUMS.project_and_sum(weights, x_7BI, slots))


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs these kernels in the tests of the step")
@pytest.mark.parametrize(
    ("selection", "make", "n_sequences", "int8"),
    pairwise(selection=SELECTIONS[1::2], make=DECODERS, n_sequences=[1, 3], int8=[False, True]),
)
def test_the_step_in_the_interpreter(
    triton_products: ModuleType,
    selection: Selection,
    make: MakeDecoder,
    n_sequences: int,
    int8: bool,
) -> None:
    products = Products(triton_products.project, triton_products.project_and_sum)
    twin, plan = packed(make(), int8=int8), uniform(selection)
    tokens = torch.randint(V, (n_sequences, 2))
    step = CudaStep(twin, plan, n_sequences, products=products)
    found = in_steps(twin, plan, tokens, 0, step=step)
    assert_near(found, token_by_token(twin, plan, tokens, 0), 4e-6)
