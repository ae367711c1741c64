"""Generating tokens with a KV cache, one after another.

Shapes: B sequences in a batch, T positions of the prompt, S all positions so far.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lightning_dsmoe.decoder import Decoder, DecoderOutput
from lightning_dsmoe.inference.engine.engine import Engine
from lightning_dsmoe.inference.sampling import Sampler
from lightning_dsmoe.moved import renamed_options
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.token_shapes import check_mask

Tokens = Tensor | NDArray[np.integer[Any]] | Sequence[int] | Sequence[Sequence[int]]
"""Prompts of whole numbers: several of one length `[B, T]`, or one `[T]`."""


@renamed_options(context="context_length")
@torch.inference_mode()
def generate(
    model: Decoder | Engine,
    tokens: Tokens,
    max_new_tokens: int,
    plan: SelectionPlan | None = None,
    *,
    mask: Tensor | None = None,
    context_length: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Collection[int] = (),
    generator: torch.Generator | None = None,
    on_tokens: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue prompts of tokens.

    A full context drops its older half, so sequences may be of any length; padding counts too. A
    sequence that has met a stop token repeats it until all have ended.

    Args:
        model: the model, in evaluation mode.
        tokens: prompts `[B, T]`, one token or more, padded on the left if of different lengths; or
            one prompt `[T]`. Arrays and lists will do.
        max_new_tokens: most tokens to add.
        plan: the experts that run in this call; None runs all.
        mask: bool `[B, T]`, false for padding; None for no padding.
        context_length: most tokens that the model attends to; None takes `decoder.max_positions`.
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

    Examples:
        >>> from functools import partial
        >>> import torch
        >>> from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts
        >>> heads = partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=8)
        >>> experts = partial(MixtureOfExperts, n_experts=4, d_expert=8)
        >>> decoder = Decoder(256, 16, 2, attention=heads, feed_forward=experts)
        >>> generate(decoder.eval(), [72, 105, 32], max_new_tokens=5, temperature=0).shape
        torch.Size([8])
        >>> generator = torch.Generator().manual_seed(0)
        >>> generate(decoder, [[1, 2], [3, 4]], 6, top_p=0.9, generator=generator).shape
        torch.Size([2, 8])
    """
    prompts_BT = as_tokens(model, tokens)
    mask = None if mask is None else torch.as_tensor(mask, device=prompts_BT.device)
    if is_one := prompts_BT.ndim == 1:
        prompts_BT, mask = prompts_BT[None], None if mask is None else mask[None]
    columns = [prompts_BT]
    for new_B in new_tokens(
        model,
        prompts_BT,
        max_new_tokens,
        plan=plan,
        mask=mask,
        context_length=context_length,
        stop=stop,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
    ):
        columns.append(new_B[:, None])
        if on_tokens is not None:
            on_tokens(new_B)
    sequences_BS = torch.cat(columns, dim=1)
    return sequences_BS[0] if is_one else sequences_BS


def new_tokens(
    model: Decoder | Engine,
    prompts_BT: Tensor,
    max_new_tokens: int,
    *,
    plan: SelectionPlan | None = None,
    mask: Tensor | None = None,
    context_length: int | None = None,
    stop: Collection[int] = (),
    **sampling: Any,
) -> Iterator[Tensor]:
    """Each new column of tokens `[B]` of prompts `[B, T]`, under the options of `generate`.

    Options are checked now, and each token is computed when the iterator is advanced.
    """
    decoder = model if isinstance(model, Decoder) else model.decoder
    _check_prompts(decoder, prompts_BT, mask, stop)
    most = decoder.max_positions
    if context_length is None:
        context_length = most
    elif most is not None and context_length > most:
        raise ValueError(f"a context of {context_length}, but the model has {most} positions")
    batch_size, length = prompts_BT.shape
    if context_length is not None and length > context_length:
        raise ValueError(f"the prompt has {length} tokens, the context holds {context_length}")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be a whole number from 0, got {max_new_tokens!r}")
    sampler = Sampler(**sampling)
    plan = SelectionPlan() if plan is None else plan
    decoder.selections(plan)  # raises if it does not fit
    capacity = min(length + max_new_tokens, context_length or length + max_new_tokens)

    @torch.inference_mode()
    def columns() -> Iterator[Tensor]:
        stops = torch.tensor(sorted(stop), dtype=prompts_BT.dtype, device=prompts_BT.device)
        ended_B = prompts_BT.new_zeros(batch_size, dtype=torch.bool)
        sequences_BS = F.pad(prompts_BT, (0, max_new_tokens))
        valid_BS = None if mask is None else F.pad(mask.bool(), (0, max_new_tokens), value=True)
        read = _reader(model, batch_size, capacity, plan)
        first = start = 0  # of the tokens in the cache, and of those to read
        for end in range(length, length + max_new_tokens):
            if end - first > capacity:
                # Half is forgotten at once: a window that moved with every token would shift all
                # positions, and so need all of it to be read again for each of them.
                read = _reader(model, batch_size, capacity, plan)
                first = start = end - max(1, capacity // 2)
            # Without a mask single tokens may take the compiled step, which knows no padding.
            new_mask = valid_BS[:, start:end] if valid_BS is not None and start < length else None
            new_B = sampler(read(sequences_BS[:, start:end], new_mask))
            if len(stops):
                new_B = torch.where(ended_B, sequences_BS[:, end - 1], new_B)
                ended_B |= torch.isin(new_B, stops)
            sequences_BS[:, end] = new_B
            start = end
            yield new_B
            if len(stops) and bool(ended_B.all()):
                return

    return columns()


def _reader(
    model: Decoder | Engine, batch_size: int, capacity: int, plan: SelectionPlan
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Start sequences: a function of new tokens `[B, T]` that gives the logits after the last.

    Its second argument is bool `[B, T]`, false for padding on the left; None for no padding.
    """
    if isinstance(model, Engine):
        return model.open(batch_size, capacity, plan).read
    caches = model.new_caches(batch_size, capacity)

    def read(tokens_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        output: DecoderOutput = model(tokens_BT, plan, mask=mask_BT, caches=caches)
        return output.logits[:, -1]

    return read


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


def left_pad(sequences: list[list[int]], *, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left to one length.

    Args:
        sequences: the tokens of each prompt.
        pad: the token to pad with, which the mask hides.

    Returns:
        Tokens `[B, T]` and the mask `[B, T]`, false for padding.

    Examples:
        >>> tokens, mask = left_pad([[5], [1, 2, 3]])
        >>> tokens
        tensor([[0, 0, 5],
                [1, 2, 3]])
        >>> mask
        tensor([[False, False,  True],
                [ True,  True,  True]])
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
    decoder: Decoder, tokens: Tensor, mask: Tensor | None, stop: Collection[int]
) -> None:
    if not isinstance(stop, Collection) or not all(
        isinstance(token, int | np.integer) for token in stop
    ):
        raise ValueError(f"stop must be tokens for prompts of tokens, got {stop!r:.80}")
    vocabulary = range(decoder.vocab_size)
    outside = [t for t in (int(tokens.min()), int(tokens.max()), *stop) if t not in vocabulary]
    if outside:
        raise ValueError(f"token {outside[0]} is not in 0 to {decoder.vocab_size - 1}")
    if mask is None:
        return
    if mask.shape != tokens.shape:
        raise ValueError(f"a mask of {tuple(mask.shape)} for prompts of {tuple(tokens.shape)}")
    check_mask(mask, tokens.shape)
    valid = mask.bool()
    if not valid[:, -1].all() or (valid[:, :-1] & ~valid[:, 1:]).any():
        raise ValueError("a prompt is empty, or its padding is not on the left")
