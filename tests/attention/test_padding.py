"""Masks of padding: which are taken, which are refused, and those of PyTorch's own attention."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_dsmoe import (
    Decoder,
    GroupedQueryAttention,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
    SelectionPlan,
    compile_sparse,
)
from lightning_dsmoe.attention import Attention, KVCache, from_key_padding_mask
from lightning_dsmoe.inference.generation import generate

TOKENS = torch.arange(6).view(2, 3)
VALID = torch.tensor([[True, True, True], [False, True, True]])
ADDED = torch.zeros(2, 3).masked_fill(~VALID, float("-inf"))
LAYERS: dict[str, Callable[[], Attention]] = {
    "mixture": lambda: MixtureOfAttentionHeads(8, 4, 1, 4),
    "grouped-query": lambda: GroupedQueryAttention(8, 2, 1, 4),
}
REFUSED = {
    "added": (ADDED, "a mask must be bool, true for tokens .* got torch.float32; .*padding_mask"),
    "double": (ADDED.double(), "a mask must be bool"),
    "pairs": (VALID[:, None].repeat(1, 3, 1), r"a mask of \(2, 3, 3\) .* it is \[B, T\]"),
    "square": (torch.ones(3, 3).tril().bool(), r"a mask of \(3, 3\) .* the layer's `causal`"),
    "batch": (VALID[:1], r"a mask of \(1, 3\) for tokens of \(2, 3\)"),
    "heads": (VALID[:, None, None], r"a mask of \(2, 1, 1, 3\) for tokens of \(2, 3\)"),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", REFUSED)
def test_what_is_no_mask_of_padding_is_refused(layer: str, form: str) -> None:
    mask, message = REFUSED[form]
    for cache in (None, KVCache(2, 1, 4, 4)):
        with pytest.raises(ValueError, match=message):
            LAYERS[layer]()(torch.ones(2, 3, 8), mask=mask, cache=cache)


def test_a_list_is_no_mask() -> None:
    with pytest.raises(TypeError, match="a mask must be a tensor, got list"):
        LAYERS["mixture"]()(torch.ones(2, 3, 8), mask=VALID.tolist())  # type: ignore[arg-type]


def test_models_and_generation_refuse_the_same() -> None:
    decoder = Decoder(
        11,
        8,
        2,
        attention=partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=4),
        feed_forward=partial(MixtureOfExperts, n_experts=4, d_expert=4),
    ).eval()
    sparse = compile_sparse(decoder, SelectionPlan())
    runs: tuple[Callable[[Tensor], object], ...] = (
        lambda mask: decoder(TOKENS, mask=mask),
        lambda mask: sparse.logits(TOKENS, mask=mask),
        lambda mask: generate(decoder, TOKENS, 1, mask=mask),
    )
    for run in runs:
        with pytest.raises(ValueError, match="a mask must be bool"):
            run(ADDED)
        run(VALID)


@pytest.mark.parametrize("layer", LAYERS)
def test_numbers_of_0_and_1_are_what_bools_are(layer: str) -> None:
    attention, x = LAYERS[layer](), torch.randn(2, 3, 8)
    expected = attention(x, mask=VALID).output
    assert torch.equal(attention(x, mask=VALID.long()).output, expected)
    assert not torch.allclose(attention(x, mask=~VALID).output[1], expected[1])


def test_masks_of_pytorch_by_name() -> None:
    for form in (~VALID, ADDED, ADDED.bfloat16()):
        assert torch.equal(from_key_padding_mask(form), VALID)
    for wrong, message in (
        (VALID.long(), "is bool or floats, got torch.int64"),
        (torch.ones(2, 3), "must be 0 for tokens and -inf for padding"),
        (ADDED[0], r"must be \[B, T\], got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            from_key_padding_mask(wrong)


def test_pytorch_hides_the_same_tokens() -> None:
    theirs = torch.nn.MultiheadAttention(8, 2, bias=False, batch_first=True).eval()
    ours = GroupedQueryAttention(8, 2, 2, 4, rope_theta=None, causal=False)
    query, key_value = theirs.in_proj_weight.detach().split([8, 16])
    ours.load_state_dict(
        {
            # Query heads are groups of one head for each KV head; here one group of both.
            "heads.w_q.weight": query[None],
            "heads.w_o.weight": theirs.out_proj.weight.detach().T[None],
            "heads.kv.weight": key_value,
        }
    )
    x = torch.randn(2, 3, 8)
    expected, _ = theirs(x, x, x, key_padding_mask=~VALID)
    found = ours(x, mask=from_key_padding_mask(~VALID)).output
    torch.testing.assert_close(found[VALID], expected[VALID])
