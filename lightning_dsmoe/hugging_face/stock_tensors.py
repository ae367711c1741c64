"""The weights of a decoder as the tensors of a stock class of transformers.

Shapes: E experts, D width, F hidden units; leading dimensions are those of one weight.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Block, Decoder
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.hugging_face.targets import StockClass
from lightning_dsmoe.hugging_face.weight_map import Entry, entries
from lightning_dsmoe.serialization.architecture import build_decoder, describe_decoder
from lightning_dsmoe.serialization.shards import Part

_ALL_ZEROS = "feed_forward.experts.b_in"
"""Where a class has the output bias of experts alone; see `traits`."""
_HALF = 0.5
"""The sigmoid of 0: the gate of a shared expert where its weights are zeros."""


class _Change(NamedTuple):
    """What is done to a weight before it is laid out as theirs.

    Args:
        factor: multiplies it.
        remaining: the experts that it has, which get their places among E, zeros between them.
        n_experts: number of experts E.
    """

    factor: float = 1.0
    remaining: Tensor | None = None
    n_experts: int = 0

    def __call__(self, weight: Tensor) -> Tensor:
        if self.remaining is not None:
            whole_E = weight.new_zeros(self.n_experts, *weight.shape[1:])
            weight = whole_E.index_copy(0, self.remaining.to(weight.device), weight)
        return weight if self.factor == 1 else weight * self.factor


def stock_parts(stock: StockClass, decoder: Decoder) -> Iterator[Part]:
    """All tensors of a stock class, made when they are written.

    The factor of our gates goes into the projection behind them.

    Args:
        stock: a class that computes what the decoder does.
        decoder: the decoder.
    """
    state = decoder.state_dict()
    if decoder.tie_embeddings:
        del state["head.weight"]
    state = {name: weight for name, weight in state.items() if not name.endswith(_ALL_ZEROS)}
    places = entries(stock.model_type, _with_all_experts(decoder))
    if sorted(place.ours for place in places) != sorted(state):
        raise AssertionError(f"{stock.model_type} has no place for some of {sorted(state)}")
    changes = _changes(stock, decoder)
    for place in places:
        weight, change = state[place.ours].detach(), changes.get(place.ours, _Change())
        empty = _theirs(torch.empty_like(weight, device="meta"), place, change)
        names = dict(zip(place.theirs, empty, strict=True))
        yield Part(names, partial(_theirs, weight, place, change))
    for name, shape in _zeros(stock, decoder):
        zeros = partial(torch.zeros, shape, dtype=decoder.embedding.weight.dtype)
        yield Part({name: zeros(device="meta")}, partial(_alone, zeros))


def _theirs(weight: Tensor, place: Entry, change: _Change) -> Sequence[Tensor]:
    if weight.is_meta and change.remaining is not None:
        change = change._replace(remaining=change.remaining.to("meta"))
    return place.to_theirs(change(weight))


def _alone(make: partial[Tensor]) -> list[Tensor]:
    return [make()]


def _changes(stock: StockClass, decoder: Decoder) -> dict[str, _Change]:
    """By the names of our weights."""
    found = {}
    for number, block in enumerate(cast(Iterable[Block], decoder.blocks)):
        name, layer = f"blocks.{number}", block.feed_forward
        if isinstance(layer, MixtureOfExperts):
            removed = layer.remaining, layer.n_experts
            experts = f"{name}.feed_forward.experts"
            found[f"{experts}.w_in.weight"] = _Change(1.0, *removed)
            found[f"{experts}.w_out.weight"] = _Change(layer.gate_factor, *removed)
            if layer.shared is not None and stock.shared_gate and layer.shared_gate is None:
                found[f"{name}.feed_forward.shared.experts.w_out.weight"] = _Change(1 / _HALF)
        if isinstance(heads := block.attention, MixtureOfAttentionHeads):
            removed = heads.remaining, heads.n_experts
            found[f"{name}.attention.heads.w_q.weight"] = _Change(1.0, *removed)
            found[f"{name}.attention.heads.w_o.weight"] = _Change(heads.gate_factor, *removed)
    return found


def _zeros(stock: StockClass, decoder: Decoder) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What a class always has and the decoder has not: zeros have the same effect."""
    width = decoder.d_model
    for number, block in enumerate(cast(Iterable[Block], decoder.blocks)):
        name, layer = f"model.layers.{number}", block.feed_forward
        if not isinstance(layer, MixtureOfExperts):
            continue
        if stock.shared_gate:
            if layer.shared is None:
                yield f"{name}.mlp.shared_expert.gate_proj.weight", (1, width)
                yield f"{name}.mlp.shared_expert.up_proj.weight", (1, width)
                yield f"{name}.mlp.shared_expert.down_proj.weight", (width, 1)
            if layer.shared is None or layer.shared_gate is None:
                yield f"{name}.mlp.shared_expert_gate.weight", (1, width)
        if stock.mixes_heads:
            if cast(MixtureOfAttentionHeads, block.attention).heads.b_o is None:
                yield f"{name}.self_attention.experts.bias", (width,)
            if layer.experts.b_out is None:
                yield f"{name}.mlp.bias", (width,)


def _with_all_experts(decoder: Decoder) -> Decoder:
    """A decoder of the same sizes that has all its experts, on the meta device if some are gone."""
    description = describe_decoder(decoder)
    if description.pop("remaining", None) is None:
        return decoder
    return build_decoder(description)
