"""Removing experts from a decoder for good.

Routers stay whole and still score all experts, since the softmax over fewer would change the gates
of those that remain. `lightning_dsmoe.routing.removed` says how selections then choose.
"""

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple, Self, cast

import torch
from torch import nn

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Block, Decoder
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.reading import check_json, shown

Numbers = tuple[int, ...]
Mixture = MixtureOfExperts | MixtureOfAttentionHeads


class _Parts(NamedTuple):
    """Names of parameters with a slice for every expert, and of those that all experts share."""

    of_each: tuple[str, ...]
    shared: tuple[str, ...]


_EXPERTS = _Parts(("w_in.weight", "w_out.weight", "b_in"), ("b_out",))
_HEADS = _Parts(("w_q.weight", "w_o.weight", "b_q"), ("b_o", "kv.", "q_norm.", "k_norm."))


class Remaining(NamedTuple):
    """Numbers of the experts that remain in each layer, ascending; None for all of them.

    Args:
        experts: the feed-forward experts of each layer.
        attention: the attention experts of each layer.

    Examples:
        >>> Remaining(experts=((0, 2), None), attention=(None, None)).to_dict()
        {'experts': [[0, 2], None], 'attention': [None, None]}
    """

    experts: tuple[Numbers | None, ...]
    attention: tuple[Numbers | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            kind: [None if numbers is None else list(numbers) for numbers in layers]
            for kind, layers in self._asdict().items()
        }

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: for anything else.
        """
        kinds = check_json("remaining", data, cls)
        layers = (kinds[kind] for kind in cls._fields)
        return cls(*(tuple(None if n is None else tuple(n) for n in each) for each in layers))


def prune(decoder: Decoder, remaining: Remaining) -> Decoder:
    """A copy of a decoder without some of its experts, which runs the same plans.

    Outputs are unchanged wherever a plan runs only experts that remain. Elsewhere a selection
    chooses among the remaining ones by their unchanged scores, and at least one always runs: `TopK`
    takes the next best, `Threshold` those above the threshold or else the best.

    Args:
        decoder: the decoder before it is compiled; it is not changed.
        remaining: the experts that remain.

    Returns:
        The smaller decoder.

    Raises:
        ValueError: if `remaining` does not match the decoder, or a layer keeps weights of its
            experts under names that are not known.

    Examples:
        >>> from functools import partial
        >>> from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts
        >>> heads = partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=4)
        >>> experts = partial(MixtureOfExperts, n_experts=4, d_expert=6)
        >>> decoder = Decoder(8, 8, n_layers=1, attention=heads, feed_forward=experts)
        >>> smaller = prune(decoder, Remaining(experts=((0, 2),), attention=(None,)))
        >>> smaller.blocks[0].feed_forward.experts.n_experts
        2
    """
    pruned = copy.deepcopy(decoder)
    remove_experts(pruned, remaining)
    return pruned


def remove_experts(decoder: Decoder, remaining: Remaining) -> None:
    """Do in place what `prune` does, on any device, including meta."""
    for kind, layers, numbers in zip(Remaining._fields, mixtures(decoder), remaining, strict=True):
        if len(numbers) != decoder.n_layers:
            raise ValueError(
                f"remaining {kind} of {len(numbers)} layers, a model of {decoder.n_layers}"
            )
        for layer, (mixture, experts) in enumerate(zip(layers, numbers, strict=True)):
            if experts is not None:
                _remove_others(mixture, experts, f"layer {layer}, {kind}")


def remaining_experts(decoder: Decoder) -> Remaining | None:
    """The experts that remain in a decoder; None if none was removed."""
    experts, attention = (
        tuple(
            None if each is None or each.remaining is None else tuple(each.remaining.tolist())
            for each in layers
        )
        for layers in mixtures(decoder)
    )
    return Remaining(experts, attention) if any(experts + attention) else None


def mixtures(decoder: Decoder) -> tuple[list[Mixture | None], list[Mixture | None]]:
    """The feed-forward and the attention mixtures that can lose experts, None in other layers.

    Those are this library's own classes, whose weights are known, and no subclasses of them.
    """
    blocks = list(cast(Iterable[Block], decoder.blocks))
    return (
        [b.feed_forward if type(b.feed_forward) is MixtureOfExperts else None for b in blocks],
        [b.attention if type(b.attention) is MixtureOfAttentionHeads else None for b in blocks],
    )


def _remove_others(mixture: Mixture | None, experts: Numbers, where: str) -> None:
    """Remove all experts of a layer but some."""
    if mixture is None:
        raise ValueError(f"{where}: there is no mixture to remove experts from")
    before = mixture.remaining
    present = list(range(mixture.n_experts)) if before is None else before.tolist()
    if not experts or list(experts) != sorted(set(experts) & set(present)):
        raise ValueError(
            f"{where}: remaining experts must be ascending numbers of experts that are present, "
            f"got {shown(experts)}"
        )
    if len(experts) == len(present):
        return
    place_of = {number: place for place, number in enumerate(present)}
    places = [place_of[number] for number in experts]
    if isinstance(mixture, MixtureOfExperts):
        device = _shorten(mixture.experts, _EXPERTS, places, where)
        mixture.experts.n_experts = len(places)
    else:
        device = _shorten(mixture.heads, _HEADS, places, where)
        mixture.heads.n_groups = len(places)
    mixture.remaining = torch.tensor(experts, device="cpu" if device.type == "meta" else device)


def _shorten(owner: nn.Module, parts: _Parts, places: list[int], where: str) -> torch.device:
    """Keep the slices of some experts, and return the device that they are on."""
    tensors = dict([*owner.named_parameters(), *owner.named_buffers()])
    unknown = [name for name in tensors if not name.startswith((*parts.of_each, *parts.shared))]
    if unknown or parts.of_each[0] not in dict(owner.named_parameters()):
        raise ValueError(
            f"{where}: experts can be removed before a model is compiled, from classes whose "
            f"weights are known, got {', '.join(unknown) or 'a compiled model'}"
        )
    for name in set(parts.of_each) & set(tensors):
        path, _, last = name.rpartition(".")
        values = tensors[name].detach()[places]
        parameter = nn.Parameter(values, requires_grad=tensors[name].requires_grad)
        setattr(owner.get_submodule(path), last, parameter)
    return tensors[parts.of_each[0]].device
