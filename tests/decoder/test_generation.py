"""KV caches, left padding and the composition of batches."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.routing import AllExperts, Selection, SelectionPlan, Threshold, TopK, TopP

from ..pairwise import pairwise
from .conftest import learned_positions_mlp, rotary_glu

DECODERS = [rotary_glu, learned_positions_mlp]
SELECTIONS: list[Selection] = [AllExperts(), TopK(1), TopK(2), Threshold(0.9), TopP(0.6)]


@pytest.fixture(params=SELECTIONS, ids=str)
def plan(request: pytest.FixtureRequest, decoder: Decoder) -> SelectionPlan:
    return SelectionPlan(experts=request.param, attention=request.param)


def in_chunks(
    decoder: Decoder,
    plan: SelectionPlan,
    tokens: Tensor,
    lengths: Sequence[int],
    mask: Tensor | None = None,
) -> Tensor:
    caches = decoder.new_caches(len(tokens), tokens.shape[1])
    logits = []
    at = 0
    for length in lengths:
        part = slice(at, at + length)
        part_mask = None if mask is None else mask[:, part]
        logits.append(decoder(tokens[:, part], plan, mask=part_mask, caches=caches).logits)
        at += length
    assert caches[0].length == tokens.shape[1]
    return torch.cat(logits, 1)


def left_padded(prompts: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    tokens = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return tokens, mask


@pytest.mark.parametrize(
    ("make_decoder", "plan", "lengths"),
    pairwise(
        make_decoder=DECODERS,
        plan=SELECTIONS,
        lengths=[(16,), (1,) * 16, (7, 1, 5, 3), (3, 13)],
    ),
    indirect=["make_decoder", "plan"],
)
@torch.no_grad()
def test_chunks_through_caches_equal_one_pass(
    decoder: Decoder, plan: SelectionPlan, lengths: tuple[int, ...], batches: list[Tensor]
) -> None:
    whole = decoder(batches[0], plan).logits
    chunks = in_chunks(decoder, plan, batches[0], lengths)
    torch.testing.assert_close(chunks, whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_greedy_tokens_are_the_same_with_and_without_caches(
    decoder: Decoder, plan: SelectionPlan, batches: list[Tensor]
) -> None:
    plain = cached = batches[0][:, :5]
    caches = decoder.new_caches(3, 13)
    new = cached
    for _ in range(8):
        logits = decoder(plain, plan).logits[:, -1]
        logits_cached = decoder(new, plan, caches=caches).logits[:, -1]
        torch.testing.assert_close(logits_cached, logits, rtol=0, atol=1e-5)
        plain = torch.cat([plain, logits.argmax(-1, keepdim=True)], 1)
        new = logits_cached.argmax(-1, keepdim=True)
        cached = torch.cat([cached, new], 1)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(
    ("make_decoder", "plan", "row"),
    pairwise(make_decoder=DECODERS, plan=SELECTIONS, row=[0, 7]),
    indirect=["make_decoder", "plan"],
)
@torch.no_grad()
def test_a_prompt_does_not_feel_its_batch(
    decoder: Decoder, plan: SelectionPlan, row: int, batches: list[Tensor]
) -> None:
    prompts = [batches[n // 3][n % 3, : 4 + n] for n in range(8)]
    prompts[row] = batches[9][0, :9]
    alone = decoder(prompts[row][None], plan).logits[0]
    tokens, mask = left_padded(prompts, 13)
    together = decoder(tokens, plan, mask=mask).logits
    assert together.isfinite().all()
    torch.testing.assert_close(together[row, -9:], alone, rtol=0, atol=1e-5)
    chunks = in_chunks(decoder, plan, tokens, (3, 1, 9), mask)
    torch.testing.assert_close(chunks[row, -9:], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(
    decoder: Decoder, plan: SelectionPlan, batches: list[Tensor]
) -> None:
    tokens, mask = left_padded([batches[0][0, :4], batches[0][1, :9]], 9)
    other = torch.where(mask, tokens, 5)
    torch.testing.assert_close(
        decoder(other, plan, mask=mask).logits[mask],
        decoder(tokens, plan, mask=mask).logits[mask],
        rtol=0,
        atol=1e-6,
    )


@torch.no_grad()
def test_first_cache_does_not_depend_on_the_plan(decoder: Decoder, batches: list[Tensor]) -> None:
    caches = [decoder.new_caches(3, 16) for _ in range(2)]
    for some, k in zip(caches, (1, 3), strict=True):
        uniform = SelectionPlan(experts=TopK(k), attention=TopK(k))
        decoder(batches[0], uniform, caches=some)
    assert torch.equal(caches[0][0].keys, caches[1][0].keys)
    assert torch.equal(caches[0][0].values, caches[1][0].values)
    assert not torch.equal(caches[0][1].keys, caches[1][1].keys)


def test_more_tokens_than_a_cache_holds_are_refused(decoder: Decoder) -> None:
    caches = decoder.new_caches(1, 4)
    with pytest.raises(ValueError, match="5 tokens do not fit a cache of 4"):
        decoder(torch.zeros(1, 5, dtype=torch.long), caches=caches)


def test_more_tokens_than_learned_positions_are_refused(
    make_decoder: Callable[..., Decoder],
) -> None:
    decoder = make_decoder(max_positions=6)
    caches = decoder.new_caches(1, 20)
    decoder(torch.zeros(1, 4, dtype=torch.long), caches=caches)
    for tokens, cached in ((7, None), (3, caches)):
        with pytest.raises(ValueError, match="7 tokens, but this model has 6 learned positions"):
            decoder(torch.zeros(1, tokens, dtype=torch.long), caches=cached)
