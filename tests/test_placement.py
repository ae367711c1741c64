"""Blocks are made on a device and in a type, as the layers of PyTorch are.

Shapes: B sequences, T positions, D width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dsmoe import (
    CosineRouter,
    Decoder,
    FeedForward,
    GLUExperts,
    GroupedQueryAttention,
    LinearRouter,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
    MLPExperts,
    MLPRouter,
    TopK,
)
from lightning_dsmoe.serialization.architecture import build_decoder, describe_decoder
from lightning_dsmoe.stacked import StackedWeight

D = 16
BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "stacked": partial(StackedWeight, 4, 6, D, fan_in=D),
    "linear router": partial(LinearRouter, D, 4),
    "mlp router": partial(MLPRouter, D, 4, d_hidden=5),
    "cosine router": partial(CosineRouter, D, 4, d_hidden=5),
    "mlp experts": partial(MLPExperts, D, 4, 6, bias=True),
    "glu experts": partial(GLUExperts, D, 4, 6, bias=True),
    "feed-forward": partial(FeedForward, D, 12),
    "mixture": partial(MixtureOfExperts, D, 4, 6, d_shared=3, router=MLPRouter),
    "attention": partial(GroupedQueryAttention, D, 4, 2, 4, qk_norm=True, bias=True),
    "heads": partial(MixtureOfAttentionHeads, D, 4, 2, 4, qk_norm=True, bias=True),
}


@pytest.fixture(params=BLOCKS.values(), ids=BLOCKS)
def make(request: pytest.FixtureRequest) -> Callable[..., nn.Module]:
    return request.param  # type: ignore[no-any-return]


def all_tensors(block: nn.Module) -> list[Tensor]:
    return [*block.parameters(), *block.buffers()]


def called(block: nn.Module, x: Tensor) -> Tensor:
    if isinstance(block, StackedWeight):
        return block()  # type: ignore[no-any-return]
    if isinstance(block, MLPExperts | GLUExperts):
        return block(x[0])  # type: ignore[no-any-return]
    return block(x)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_all_weights_are_where_and_what_was_asked(
    dtype: torch.dtype | None, make: Callable[..., nn.Module]
) -> None:
    block = make(device="meta", dtype=dtype)
    assert {tensor.device.type for tensor in all_tensors(block)} == {"meta"}
    assert {tensor.dtype for tensor in all_tensors(block)} == {dtype or torch.float32}
    here = make(dtype=dtype)
    assert {tensor.device.type for tensor in all_tensors(here)} == {"cpu"}
    assert {tensor.dtype for tensor in all_tensors(here)} == {dtype or torch.float32}


def test_a_block_of_the_meta_device_is_drawn_as_one_made_here(
    make: Callable[..., nn.Module],
) -> None:
    block = make(device="meta").to_empty(device="cpu")
    for tensor in all_tensors(block):
        tensor.data.fill_(torch.nan)
    torch.manual_seed(0)
    for module in block.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in all_tensors(block))
    made = make()
    for drawn, expected in zip(all_tensors(block), all_tensors(made), strict=True):
        assert drawn.std(correction=0).item() == pytest.approx(
            expected.std(correction=0).item(), rel=0.5, abs=1e-6
        )


@torch.no_grad()
def test_half_precision_from_the_start_is_half_precision_later(
    make: Callable[..., nn.Module],
) -> None:
    block, later = make(dtype=torch.bfloat16), make().bfloat16()
    later.load_state_dict(block.state_dict())
    x = torch.randn(2, 5, D, dtype=torch.bfloat16)
    assert torch.equal(called(block, x), called(later, x))
    routing = getattr(block, "router", None)
    assert routing is None or routing(x).probs.dtype == torch.float32


@pytest.mark.parametrize("make_layer", [MixtureOfExperts, MixtureOfAttentionHeads])
def test_factories_of_users_get_only_what_was_given(make_layer: Any) -> None:
    def own(d_model: int, n_experts: int) -> LinearRouter:
        return LinearRouter(d_model, n_experts)

    sizes = (D, 4, 6) if make_layer is MixtureOfExperts else (D, 4, 2, 4)
    assert make_layer(*sizes, router=own)(torch.randn(1, 3, D), TopK(1)).output.shape == (1, 3, D)
    with pytest.raises(TypeError, match="unexpected keyword argument 'dtype'"):
        make_layer(*sizes, router=own, dtype=torch.bfloat16)


def test_a_description_of_a_decoder_has_neither() -> None:
    decoder = Decoder(
        11,
        D,
        1,
        attention=partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=4, device="cpu"),
        feed_forward=partial(MixtureOfExperts, n_experts=2, d_expert=4, dtype=torch.float64),
    )
    description = describe_decoder(decoder)
    assert "device" not in str(description)
    assert "dtype" not in str(description)
    assert build_decoder(description).n_layers == 1
