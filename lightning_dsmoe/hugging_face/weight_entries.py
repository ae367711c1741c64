"""Where the tensors of a transformers checkpoint go in a decoder: one `Entry` for each of ours.

Both directions are permutations of numbers, so a round trip is bit-equal. The functions below make
the entries of one part, which the families put together under their own names.

Shapes: D width, E experts or groups of query heads, H KV heads = query heads of one group, C head
width, F hidden units of one expert.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from lightning_dsmoe.attention.head_groups import HeadGroups

Layout = Literal["original", "stacked"]
"""How the experts of a mixture are stored: as `save_pretrained` writes them by default, or as
transformers 5 holds them."""


class Entry(NamedTuple):
    """One tensor of a decoder, and the tensors that hold its numbers in a file of transformers.

    Args:
        theirs: names on disk, in order. "name[1/3]" is the second third of a tensor's last axis.
        ours: name in the `state_dict` of a `Decoder`.
        to_ours: makes ours of theirs.
        to_theirs: makes theirs of ours, the exact inverse; on the meta device it gives the shapes.
    """

    theirs: tuple[str, ...]
    ours: str
    to_ours: Callable[[Sequence[Tensor]], Tensor]
    to_theirs: Callable[[Tensor], Sequence[Tensor]]


def same(theirs: str, ours: str) -> Entry:
    """A tensor that both sides store alike."""
    return Entry((theirs,), ours, _only, _alone)


def transposed(theirs: str, ours: str) -> Entry:
    """A matrix, or a stack of matrices, that is transposed on disk."""
    return Entry((theirs,), ours, _only_transposed, _alone_transposed)


def rearranged(theirs: str, ours: str, pattern: str, **sizes: int) -> Entry:
    """A tensor whose axes move as an einops pattern says, read from left to right by `to_ours`."""
    left, right = pattern.split(" -> ")
    return Entry(
        (theirs,),
        ours,
        partial(_rearranged_only, pattern=pattern, sizes=sizes),
        partial(_rearranged_alone, pattern=f"{right} -> {left}", sizes=sizes),
    )


def one_after_another(theirs: Sequence[str], ours: str) -> Entry:
    """Tensors of one size that ours holds one after another, along the first axis."""
    return Entry(tuple(theirs), ours, _cat, partial(_chunks, n=len(theirs)))


def query_heads(heads: HeadGroups, ours: str, *, q: str, o: str) -> list[Entry]:
    """Query and output projections and their biases.

    Query head h E + e of transformers, the e-th of those that share KV head h, is head h of group
    e. So each group has one query head for every KV head.

    Args:
        heads: ours, for its sizes.
        ours: their name with its dot.
        q: name of the query projection on disk, with its dot.
        o: name of the output projection.
    """
    order = partial(rearranged, h=heads.n_heads, e=heads.n_groups)
    entries = [
        order(f"{q}weight", f"{ours}w_q.weight", "(h e c) d -> e (h c) d"),
        order(f"{o}weight", f"{ours}w_o.weight", "d (h e c) -> e (h c) d"),
    ]
    if heads.b_q is not None:
        entries.append(order(f"{q}bias", f"{ours}b_q", "(h e c) -> e (h c)"))
    if heads.b_o is not None:
        entries.append(same(f"{o}bias", f"{ours}b_o"))
    return entries


def keys_and_values(heads: HeadGroups, ours: str, *, k: str, v: str) -> list[Entry]:
    """Key and value projections and their biases, two tensors on disk and one of ours."""
    kinds = ["weight"] if heads.kv.bias is None else ["weight", "bias"]
    return [one_after_another([f"{k}{kind}", f"{v}{kind}"], f"{ours}kv.{kind}") for kind in kinds]


def glu_experts(names: Sequence[tuple[str, str, str]], ours: str) -> list[Entry]:
    """Experts that are stored one by one, each as a gate, an up and a down projection.

    Args:
        names: the names of the three on disk, for each expert.
        ours: name of the experts with its dot.
    """
    gate_and_up = tuple(name for gate, up, _ in names for name in (gate, up))
    return [
        Entry(gate_and_up, f"{ours}w_in.weight", _stack_pairs, _pairs),
        Entry(
            tuple(down for *_, down in names), f"{ours}w_out.weight", _stack_transposed, _matrices
        ),
    ]


def stacked_glu_experts(gate_up: str, down: str, ours: str) -> list[Entry]:
    """Experts that are stored as two stacks `[E, 2F, D]`, gate before up, and `[E, D, F]`."""
    return [same(gate_up, f"{ours}w_in.weight"), transposed(down, f"{ours}w_out.weight")]


def dense_glu(
    gate: str, up: str, down: str, ours: str, *, n_experts: int, bias: bool = False
) -> list[Entry]:
    """A dense gated layer, whose neurons are ours expert by expert; one expert is all of them."""
    entries = [
        Entry(
            (f"{gate}weight", f"{up}weight"),
            f"{ours}w_in.weight",
            partial(_split_gate_and_up, n_experts=n_experts),
            _join_gate_and_up,
        ),
        rearranged(f"{down}weight", f"{ours}w_out.weight", "d (e f) -> e f d", e=n_experts),
    ]
    if bias:
        entries += [
            Entry(
                (f"{gate}bias", f"{up}bias"),
                f"{ours}b_in",
                partial(_split_gate_and_up, n_experts=n_experts),
                _join_gate_and_up,
            ),
            same(f"{down}bias", f"{ours}b_out"),
        ]
    return entries


def _only(theirs: Sequence[Tensor]) -> Tensor:
    (tensor,) = theirs
    return tensor


def _alone(ours: Tensor) -> list[Tensor]:
    return [ours]


def _only_transposed(theirs: Sequence[Tensor]) -> Tensor:
    return _only(theirs).mT.contiguous()


def _alone_transposed(ours: Tensor) -> list[Tensor]:
    return [ours.mT.contiguous()]


def _rearranged_only(theirs: Sequence[Tensor], *, pattern: str, sizes: dict[str, int]) -> Tensor:
    return rearrange(_only(theirs), pattern, **sizes).contiguous()


def _rearranged_alone(ours: Tensor, *, pattern: str, sizes: dict[str, int]) -> list[Tensor]:
    return [rearrange(ours, pattern, **sizes).contiguous()]


def _cat(theirs: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(theirs))


def _chunks(ours: Tensor, *, n: int) -> Sequence[Tensor]:
    return ours.chunk(n)


def _stack(theirs: Sequence[Tensor], change: Callable[[Tensor], Tensor], *, dim: int = 0) -> Tensor:
    """Tensors of one type as a stack; each is let go before the next is read."""
    stack = torch.empty(0)
    for number in range(len(theirs)):
        tensor = change(theirs[number])
        if not number:
            stack = tensor.new_empty(*tensor.shape[:dim], len(theirs), *tensor.shape[dim:])
        stack.select(dim, number).copy_(tensor)
        del tensor
    return stack


def _stack_pairs(theirs: Sequence[Tensor]) -> Tensor:
    return rearrange(_stack(theirs, lambda matrix: matrix), "(e two) f d -> e (two f) d", two=2)


def _pairs(ours: Tensor) -> list[Tensor]:
    return list(rearrange(ours, "e (two f) d -> (e two) f d", two=2))


def _stack_transposed(theirs: Sequence[Tensor]) -> Tensor:
    return _stack(theirs, lambda matrix: matrix.mT)


def _matrices(ours: Tensor) -> list[Tensor]:
    return [matrix.mT.contiguous() for matrix in ours]


def _split_gate_and_up(theirs: Sequence[Tensor], *, n_experts: int) -> Tensor:
    both = _stack(theirs, partial(rearrange, pattern="(e f) ... -> e f ...", e=n_experts), dim=1)
    return both.flatten(1, 2)


def _join_gate_and_up(ours: Tensor) -> list[Tensor]:
    return list(rearrange(ours, "e (two f) ... -> two (e f) ...", two=2))
