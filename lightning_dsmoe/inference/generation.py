"""Sampling tokens from a model, one after another, with a KV cache.

Shapes: B batch, T tokens of the prompt, V vocabulary.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.engine.engine import Engine
from lightning_dsmoe.inference.reader import DecoderReader, Reader
from lightning_dsmoe.moved import renamed_options
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.routing.plan import check_plan

Tokens = Tensor | NDArray[np.integer[Any]] | Sequence[int] | Sequence[Sequence[int]]
"""Prompts of whole numbers: several of one length `[B, T]`, or one `[T]`."""

_COLDEST, _HOTTEST = 1e-6, 1e6  # beyond which probabilities are no numbers in float32


@renamed_options(context="context_length")
@torch.inference_mode()
def generate(
    model: Decoder | Engine,
    tokens: Tokens,
    max_new_tokens: int,
    *,
    plan: SelectionPlan | None = None,
    mask: Tensor | None = None,
    context_length: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Collection[int] = (),
    generator: torch.Generator | None = None,
    on_tokens: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue prompts.

    A full context forgets its older half, so texts may be of any length; padding fills it too. A
    sequence that has met a stop token repeats it until all have ended.

    Args:
        model: the model, in evaluation mode.
        tokens: prompts `[B, T]`, one token or more, padded on the left if of different lengths; or
            one prompt `[T]`. Arrays and lists will do.
        max_new_tokens: tokens to add at the most.
        plan: the experts that run; None runs all.
        mask: bool `[B, T]`, false for padding; None for no padding.
        context_length: tokens the model can look back on; None takes `decoder.max_positions`.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: sample from the k most probable tokens only.
        top_p: sample from the fewest most probable tokens that hold this much probability only.
        stop: tokens that end a sequence.
        generator: source of randomness, for repeatable samples.
        on_tokens: called with each new column of tokens `[B]`.

    Returns:
        Prompts and continuations, `[B, T + new tokens]`, or `[T + new tokens]` for one prompt.

    Raises:
        ValueError: if the prompt is empty, longer than the context or not of whole numbers, or an
            option is out of range.
        FloatingPointError: if the logits are not finite.
    """
    prompts = as_tokens(model, tokens)
    mask = None if mask is None else torch.as_tensor(mask, device=prompts.device)
    if is_one := prompts.ndim == 1:
        prompts, mask = prompts[None], None if mask is None else mask[None]
    columns = [prompts]
    for chosen_B in new_tokens(
        model,
        prompts,
        max_new_tokens,
        plan=plan,
        mask=mask,
        context_length=context_length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop,
        generator=generator,
    ):
        columns.append(chosen_B[:, None])
        if on_tokens is not None:
            on_tokens(chosen_B)
    texts = torch.cat(columns, dim=1)
    return texts[0] if is_one else texts


def new_tokens(
    model: Decoder | Engine,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    plan: SelectionPlan | None = None,
    mask: Tensor | None = None,
    context_length: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Each new column of tokens `[B]` of prompts `[B, T]`, under the options of `generate`.

    Options are checked at once, and a token is computed when it is asked for.
    """
    decoder = model if isinstance(model, Decoder) else model.decoder
    if context_length is None:
        context_length = decoder.max_positions
    _check_prompts(decoder, tokens, mask, context_length, stop)
    _check_options(max_new_tokens, temperature, top_k, top_p)
    plan = SelectionPlan.uniform(decoder.n_layers) if plan is None else plan
    check_plan(plan, decoder.n_layers)
    plan.check(*decoder.plan_sizes)
    draw = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    return _columns(model, tokens, max_new_tokens, plan, mask, context_length, stop, draw)


@torch.inference_mode()
def _columns(
    model: Decoder | Engine,
    tokens: Tensor,
    max_new_tokens: int,
    plan: SelectionPlan,
    mask: Tensor | None,
    context_length: int | None,
    stop: Collection[int],
    draw: Callable[[Tensor], Tensor],
) -> Iterator[Tensor]:
    batch, length = tokens.shape
    capacity = min(length + max_new_tokens, context_length or length + max_new_tokens)
    stops = torch.tensor(sorted(stop), dtype=tokens.dtype, device=tokens.device)
    ended = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
    text = tokens.new_empty(batch, length + max_new_tokens)
    text[:, :length] = tokens
    unpadded = text.new_ones(text.shape, dtype=torch.bool)
    if mask is not None:
        unpadded[:, :length] = mask.bool()
    reader = _open(model, batch, capacity, plan)
    start = 0
    for end in range(length, length + max_new_tokens):
        if reader.length + end - start > capacity:
            reader = _open(model, batch, capacity, plan)
            start = end - max(1, capacity // 2)
        padding = None if mask is None or start >= length else unpadded[:, start:end]
        logits_BV = reader.read(text[:, start:end], padding)
        chosen_B = draw(logits_BV)
        if len(stops):
            chosen_B = torch.where(ended, text[:, end - 1], chosen_B)
            ended |= torch.isin(chosen_B, stops)
        text[:, end] = chosen_B
        start = end
        yield chosen_B
        if len(stops) and bool(ended.all()):
            return


def as_tokens(model: Decoder | Engine, tokens: Tokens) -> Tensor:
    """Prompts `[B, T]` or `[T]` in int64, where the model is.

    Raises:
        ValueError: if they are empty, not of one length or not whole numbers.
    """
    decoder = model if isinstance(model, Decoder) else model.decoder
    if not isinstance(tokens, Tensor):
        try:
            tokens = torch.as_tensor(np.asarray(tokens))
        except (TypeError, ValueError):
            raise ValueError(
                "prompts must be whole numbers, of one length (left_pad pads them and gives the "
                f"mask), got {tokens!r:.80}"
            ) from None
    if tokens.ndim not in (1, 2) or not tokens.numel():
        raise ValueError(
            f"prompts must be [B, T] or [T] with a token or more, got {tuple(tokens.shape)}"
        )
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool:
        raise ValueError(f"prompts must be whole numbers, got {tokens.dtype}")
    return tokens.to(decoder.embedding.weight.device, torch.long)


def _open(model: Decoder | Engine, batch: int, capacity: int, plan: SelectionPlan) -> Reader:
    if isinstance(model, Engine):
        return model.open(batch, capacity, plan)
    return DecoderReader(model, batch, capacity, plan)


def sample(
    logits_BV: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token `[B]` for each row of logits `[B, V]`; the options are those of `generate`.

    A logit of minus infinity rules a token out.

    Raises:
        FloatingPointError: if logits are NaN or infinite, or rule out all tokens.
    """
    if temperature == 0:
        most_B, chosen_B = logits_BV.max(-1)
        if not all(map(math.isfinite, most_B.tolist())):  # a NaN is the largest of any numbers
            raise _not_finite()
        return chosen_B
    logits = logits_BV.float()
    order = None
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(~_largest(logits, top_k), -torch.inf)
    if top_p is not None:
        logits, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p is not None:
        dropped = probs.cumsum(-1) - probs >= top_p
        dropped[:, 0] = False
        probs = probs.masked_fill(dropped, 0.0)
    try:
        drawn = torch.multinomial(probs, 1, generator=generator)
    except RuntimeError:  # it looks for NaN itself, so looking here would only cost time
        if probs.isfinite().all():
            raise
        raise _not_finite() from None
    return (drawn if order is None else order.gather(-1, drawn)).squeeze(-1)


def _not_finite() -> FloatingPointError:
    return FloatingPointError(
        "the logits are not finite: weights hold NaN or infinity, or products of them overflow"
    )


def _largest(logits_BV: Tensor, k: int) -> Tensor:
    """The k largest of each row; of equal ones those of lower number."""
    least_B1 = logits_BV.topk(k, dim=-1).values[:, -1:]
    above_BV, equal_BV = ~(logits_BV <= least_B1), logits_BV == least_B1  # a NaN stays to be seen
    return above_BV | (equal_BV & (equal_BV.cumsum(-1) <= k - above_BV.sum(-1, keepdim=True)))


def left_pad(sequences: list[list[int]], *, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left to one length.

    Returns:
        Tokens `[B, T]` and the mask `[B, T]`, false for padding.
    """
    longest = max(map(len, sequences), default=0)
    tokens = torch.full((len(sequences), longest), pad)
    mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        if sequence:
            tokens[row, -len(sequence) :] = torch.tensor(sequence)
            mask[row, -len(sequence) :] = True
    return tokens, mask


def _check_prompts(
    decoder: Decoder,
    tokens: Tensor,
    mask: Tensor | None,
    context_length: int | None,
    stop: Collection[int],
) -> None:
    if not isinstance(stop, Collection) or not all(
        isinstance(token, int | np.integer) for token in stop
    ):
        raise ValueError(f"stop must be tokens for prompts of tokens, got {stop!r:.80}")
    vocabulary = range(decoder.vocab_size)
    outside = [t for t in (int(tokens.min()), int(tokens.max()), *stop) if t not in vocabulary]
    if outside:
        raise ValueError(f"token {outside[0]} is not in 0 to {decoder.vocab_size - 1}")
    most = decoder.max_positions
    if context_length is not None and most is not None and context_length > most:
        raise ValueError(f"a context of {context_length}, but the model has {most} positions")
    if context_length is not None and tokens.shape[1] > context_length:
        raise ValueError(
            f"the prompt has {tokens.shape[1]} tokens, the context holds {context_length}"
        )
    if mask is None:
        return
    if mask.shape != tokens.shape:
        raise ValueError(f"a mask of {tuple(mask.shape)} for prompts of {tuple(tokens.shape)}")
    valid = mask.bool()
    if not valid[:, -1].all() or (valid[:, :-1] & ~valid[:, 1:]).any():
        raise ValueError("a prompt is empty, or its padding is not on the left")


def _check_options(
    max_new_tokens: object, temperature: object, top_k: int | None, top_p: float | None
) -> None:
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be a whole number from 0, got {max_new_tokens!r}")
    if not isinstance(temperature, int | float):
        raise ValueError(f"temperature must be a number, got {temperature!r}")
    if temperature != 0 and not _COLDEST <= temperature <= _HOTTEST:
        raise ValueError(
            f"temperature must be 0 or from {_COLDEST:g} to {_HOTTEST:g}, got {temperature}"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
