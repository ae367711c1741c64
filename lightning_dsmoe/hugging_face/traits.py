"""What the layers of a decoder are under a plan, option by option, and which layers say so.

A `config.json` of transformers says every option once, for all layers.
"""

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from lightning_dsmoe.attention import Attention, GroupedQueryAttention, MixtureOfAttentionHeads
from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.decoder import Block, Decoder, TokenEmbedding, TokenHead
from lightning_dsmoe.experts import FeedForwardLayer, GLUExperts, MixtureOfExperts
from lightning_dsmoe.experts.feed_forward import FeedForward
from lightning_dsmoe.hugging_face.rope_parameters import rope_parameters
from lightning_dsmoe.routing import AllExperts, LinearRouter, Selection, SelectionPlan, TopK
from lightning_dsmoe.stacked import StackedWeight

ACTIVATIONS = {
    **{name: name for name in ("gelu", "hardswish", "leaky_relu", "mish", "relu", "relu6")},
    **{name: name for name in ("sigmoid", "silu", "tanh")},
    "gelu_tanh": "gelu_pytorch_tanh",
}
"""Names of transformers for ours."""


class Traits(NamedTuple):
    """Options of a decoder's layers under a plan.

    Args:
        values: each option's values, and the first module that has each.
        problems: what no stock class has, each with its module.
        dense: names of the feed-forward layers without a router, by the numbers of their blocks.
    """

    values: dict[str, dict[Any, str]]
    problems: list[str]
    dense: dict[int, str]

    def the(self, option: str) -> Any:
        """The value of an option where all layers have the same."""
        [value] = self.values[option]
        return value

    def add(self, option: str, value: Hashable, where: str) -> None:
        """Note the value of a module."""
        self.values.setdefault(option, {}).setdefault(value, where)

    def needs(self, module: nn.Module, kind: type, where: str) -> bool:
        """Whether a module is exactly of a class of ours; note a problem otherwise."""
        if type(module) is kind:
            return True
        self.problems.append(f"{where} is a {type(module).__name__}, not a {kind.__name__}")
        return False


def traits(decoder: Decoder, plan: SelectionPlan) -> Traits:
    """Read the options of all layers, and everything that no stock class has.

    Classes count exactly: a subclass may compute something else.

    Args:
        decoder: the decoder; on any device, including meta.
        plan: the experts that run.

    Raises:
        ValueError: if the plan does not fit.
    """
    found = Traits({}, [], {})
    selections = decoder.selections(plan)
    found.needs(decoder, Decoder, "the model")
    found.add("d_model", decoder.d_model, "the model")
    found.needs(decoder.embedding, TokenEmbedding, "embedding")
    found.needs(decoder.head, TokenHead, "head")
    if decoder.positions is not None:
        found.problems.append("positions: max_positions makes a learned table; rotary ones needed")
    for number, block in enumerate(cast(Iterable[Block], decoder.blocks)):
        name = f"blocks.{number}"
        found.needs(block, Block, name)
        _norm(found, "block eps", block.attention_norm, f"{name}.attention_norm")
        _norm(found, "block eps", block.feed_forward_norm, f"{name}.feed_forward_norm")
        _attention(found, block.attention, selections.attention[number], f"{name}.attention")
        if type(layer := block.feed_forward) is FeedForward:
            found.dense[number] = f"{name}.feed_forward"
            found.add("d_hidden", layer.d_hidden, f"{name}.feed_forward")
            _experts(found, layer.experts, f"{name}.feed_forward.experts")
        else:
            _feed_forward(found, layer, selections.experts[number], f"{name}.feed_forward")
    if len(found.dense) == decoder.n_layers:
        found.problems.append("no feed-forward layer has a router, which a mixture needs")
    _norm(found, "eps", decoder.norm, "norm")
    return found


def _norm(found: Traits, option: str, norm: nn.Module, where: str) -> None:
    if not found.needs(norm, nn.RMSNorm, where):
        return
    if not norm.elementwise_affine:
        found.problems.append(f"{where}: elementwise_affine=False leaves out the weights")
    found.add(option, _eps(cast(nn.RMSNorm, norm)), where)


def _eps(norm: nn.RMSNorm) -> float:
    """The eps that a norm computes with; None is that of float32 in half precision too."""
    if norm.eps is not None:
        return norm.eps
    is_double = norm.weight is not None and norm.weight.dtype is torch.float64
    return torch.finfo(torch.float64 if is_double else torch.float32).eps


def _attention(found: Traits, layer: Attention, selection: Selection, where: str) -> None:
    if isinstance(layer, MixtureOfAttentionHeads):
        if not found.needs(layer, MixtureOfAttentionHeads, where):
            return
        found.add("attention", "mixture", where)
        _routing(found, "attention experts", layer, selection, where)
    elif found.needs(layer, GroupedQueryAttention, where):
        found.add("attention", "plain", where)
    else:
        return
    layer = cast(MixtureOfAttentionHeads | GroupedQueryAttention, layer)
    heads = layer.heads
    if not found.needs(heads, HeadGroups, f"{where}.heads"):
        return
    for name in ("w_q", "w_o"):
        found.needs(getattr(heads, name), StackedWeight, f"{where}.heads.{name}")
    found.add("KV heads", layer.n_kv_heads, where)
    found.add("heads", heads_of(layer), where)
    found.add("d_head", layer.d_head, where)
    found.add("channels of all heads", heads_of(layer) * layer.d_head, where)
    found.add("q/k norm", layer.qk_norm, where)
    if layer.qk_norm:
        found.add("q/k eps", _eps(cast(nn.RMSNorm, heads.q_norm)), f"{where}.heads.q_norm")
    found.add("biases", (heads.b_q is not None, heads.b_o is not None), where)
    try:
        found.add("rotary positions", tuple(rope_parameters(layer).items()), where)
    except ValueError as error:
        found.problems.append(f"{where}: {error}")


def heads_of(layer: MixtureOfAttentionHeads | GroupedQueryAttention) -> int:
    """Query heads of all groups."""
    return layer.n_heads * (layer.n_experts if isinstance(layer, MixtureOfAttentionHeads) else 1)


def _feed_forward(found: Traits, layer: FeedForwardLayer, selection: Selection, where: str) -> None:
    if not found.needs(layer, MixtureOfExperts, where):
        return
    layer = cast(MixtureOfExperts, layer)
    _routing(found, "experts", layer, selection, where)
    _experts(found, layer.experts, f"{where}.experts")
    found.add("d_expert", layer.d_expert, where)
    found.add("d_shared", layer.d_shared, where)
    if layer.shared is not None:
        found.add("shared gate", layer.shared_gate is not None, where)
        _experts(found, layer.shared.experts, f"{where}.shared.experts")


def _experts(found: Traits, experts: nn.Module, where: str) -> None:
    if not found.needs(experts, GLUExperts, where):
        return
    experts = cast(GLUExperts, experts)
    for name in ("w_in", "w_out"):
        found.needs(getattr(experts, name), StackedWeight, f"{where}.{name}")
    if experts.activation in ACTIVATIONS:
        found.add("activation", ACTIVATIONS[experts.activation], where)
    else:
        found.problems.append(f"{where}: transformers has no activation {experts.activation!r}")
    found.add("biases of experts", _biases(experts), where)


def _biases(experts: GLUExperts) -> str:
    """Which biases have an effect; imported ones may have an output bias, and zeros before it."""
    if experts.b_in is None or experts.b_out is None:
        return "none"
    return "input and output" if experts.b_in.count_nonzero() else "output"


def _routing(
    found: Traits,
    kind: str,
    layer: MixtureOfExperts | MixtureOfAttentionHeads,
    selection: Selection,
    where: str,
) -> None:
    found.needs(layer.router, LinearRouter, f"{where}.router")
    found.add(kind, layer.n_experts, where)
    if type(selection) is AllExperts:
        k, renormalize = layer.n_experts, selection.renormalize
    elif type(selection) is TopK:
        k, renormalize = selection.k, selection.renormalize
    else:
        found.problems.append(
            f"{where}: {selection} runs a number of experts that changes from token to token, and "
            "a config.json has one num_experts_per_tok for all; a TopK of about as many is another "
            "model"
        )
        return
    found.add(f"{kind} that run", k, where)
    all_run = k == layer.n_experts
    if layer.remaining is not None and (renormalize or not all_run):
        found.problems.append(
            f"{where}: experts were removed (`remaining`), but a stock router chooses among all of "
            "them; with experts of zeros in their place it is exact only where all run at raw gates"
        )
    # All gates sum to 1 already, so that no class can tell the two apart.
    gates = "all" if all_run else "renormalized" if renormalize else "raw"
    found.add(f"gates of {kind}", gates, where)
