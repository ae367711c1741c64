"""What is given to a layer by mistake is said in one line."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_dsmoe import (
    Decoder,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
    SelectionPlan,
    TopK,
    compile_sparse,
)
from lightning_dsmoe.attention import GroupedQueryAttention
from lightning_dsmoe.experts import FeedForward
from lightning_dsmoe.losses import load_balancing_loss, mutual_information_loss

X, TOKENS, PROBS = torch.ones(2, 3, 8), torch.ones(2, 3).long(), torch.full((2, 3, 4), 0.25)
MASK = torch.ones(2, 5, dtype=torch.bool)


def decoder(**options: Any) -> Decoder:
    return Decoder(
        11,
        8,
        2,
        attention=partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=4),
        feed_forward=partial(MixtureOfExperts, n_experts=4, d_expert=4),
        **options,
    )


ROUTED = {
    "experts": lambda: MixtureOfExperts(8, 4, 6),
    "attention": lambda: MixtureOfAttentionHeads(8, 4, 1, 4),
}
LAYERS: dict[str, Callable[[], nn.Module]] = ROUTED | {
    "feed-forward": lambda: FeedForward(8, 6),
    "grouped-query": lambda: GroupedQueryAttention(8, 2, 1, 4),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_another_width(make: Callable[[], nn.Module]) -> None:
    for shape, message in (((2, 3, 9), r"got \(2, 3, 9\)"), ((), r"got \(\)")):
        with pytest.raises(ValueError, match=rf"tokens must be \[\.\.\., 8\] .*, {message}"):
            make()(torch.ones(shape))


@pytest.mark.parametrize("name", ["experts", "feed-forward"])
def test_layers_without_a_look_at_other_tokens_take_any_dimensions(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(2, 3, 8)
    expected = layer(x).output
    for shape in ((8,), (6, 8), (1, 2, 3, 8)):
        part = x[0, 0] if shape == (8,) else x.view(shape)
        found = layer(part).output
        torch.testing.assert_close(found, expected[0, 0] if shape == (8,) else expected.view(shape))
    torch.testing.assert_close(layer(x.mT.contiguous().mT).output, expected)


@pytest.mark.parametrize("name", ["attention", "grouped-query"])
def test_attention_needs_sequences_and_their_mask(name: str) -> None:
    layer = LAYERS[name]()
    for shape in ((8,), (3, 8), (1, 2, 3, 8)):
        with pytest.raises(ValueError, match=r"attention needs tokens \[B, T, D\], got"):
            layer(torch.ones(shape))
    for mask in (MASK, MASK[0, :3]):
        with pytest.raises(ValueError, match=r"a mask of .* for tokens of \(2, 3\)"):
            layer(X, mask=mask)


@pytest.mark.parametrize("make", ROUTED.values(), ids=ROUTED)
def test_what_is_no_selection(make: Callable[[], nn.Module]) -> None:
    for given, meant in (
        (2, r"such as TopK\(2\); got 2"),
        ("top", "Threshold"),
        (TopK, r"TopK\(\.\.\.\) rather than the class"),
        (SelectionPlan(), "a selection chooses experts"),
    ):
        with pytest.raises(TypeError, match=meant):
            make()(X, given)
    with pytest.raises(TypeError, match=r"such as TopK\(2\)"):
        SelectionPlan(experts=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"max_positions": 9}], ids=str)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": TOKENS.float()}, "tokens must be int64 or int32, got torch.float32"),
        ({"tokens": TOKENS[0]}, r"tokens must be \[B, T\], got \(3,\)"),
        ({"tokens": TOKENS[None]}, r"tokens must be \[B, T\], got \(1, 2, 3\)"),
        ({"tokens": TOKENS + 10}, "token 11 is not in 0 to 10"),
        ({"tokens": TOKENS - 2}, "token -1 is not in 0 to 10"),
        ({"tokens": TOKENS, "mask": MASK}, r"a mask of \(2, 5\) for tokens of \(2, 3\)"),
    ],
)
def test_what_a_model_cannot_read(
    options: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    model = decoder(**options)
    sparse = compile_sparse(model, SelectionPlan())
    for read in (model, sparse.logits):
        with pytest.raises(ValueError, match=message):
            read(**arguments)


def test_a_selection_is_no_plan() -> None:
    model = decoder()
    sparse = compile_sparse(model, SelectionPlan())
    for call in (
        lambda: model(TOKENS, TopK(1)),
        lambda: compile_sparse(model, TopK(1)),  # type: ignore[arg-type]
        lambda: sparse.logits(TOKENS, plan=TopK(1)),  # type: ignore[arg-type]
        lambda: sparse.generate([1], plan=TopK(1)),
    ):
        with pytest.raises(TypeError, match=r"such as SelectionPlan\(experts=.*got TopK"):
            call()


def test_losses_name_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"mask of shape \(2, 5\) for tokens of shape \(2, 3\)"):
        mutual_information_loss(PROBS, MASK)
    with pytest.raises(ValueError, match=r"active of \(4,\) for probs of \(2, 3, 4\)"):
        load_balancing_loss(PROBS, PROBS[0, 0] > 0)
