"""A decoder under a plan as the configuration of the own class, and what it cannot hold.

Shapes: E experts, P pairs of rotating channels.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_dsmoe.attention import GroupedQueryAttention, MixtureOfAttentionHeads
from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.attention.rotary import Rotary
from lightning_dsmoe.decoder import Block, Decoder, TokenEmbedding, TokenHead
from lightning_dsmoe.experts import (
    Experts,
    FeedForward,
    GLUExperts,
    MixtureOfExperts,
    MLPExperts,
)
from lightning_dsmoe.routing import (
    AllExperts,
    CosineRouter,
    LinearRouter,
    MLPRouter,
    Selection,
    SelectionPlan,
    Threshold,
    ThresholdTopK,
    TopK,
    TopP,
)

Data = dict[str, Any]

_ROUTERS = {LinearRouter: "linear", MLPRouter: "mlp", CosineRouter: "cosine"}
_EXPERTS = {GLUExperts: "GLU", MLPExperts: "MLP"}
_SELECTIONS = (AllExperts, TopK, Threshold, ThresholdTopK, TopP)
_NORMS = {nn.RMSNorm: ("eps", "elementwise_affine"), nn.LayerNorm: ("eps", "elementwise_affine")}
_ATTENTION = (GroupedQueryAttention, MixtureOfAttentionHeads)
_FEED_FORWARD = (FeedForward, MixtureOfExperts)


class OwnConfig(NamedTuple):
    """The fields of a configuration, and reasons why the own class cannot hold the decoder."""

    fields: Data
    problems: list[str]


def own_config(decoder: Decoder, plan: SelectionPlan) -> OwnConfig:
    """Describe a decoder under a plan for `DSMoEConfig`.

    Args:
        decoder: the decoder; it may be on the meta device.
        plan: the experts that run.
    """
    blocks = list(cast(Iterable[Block], decoder.blocks))
    problems = _other_classes(decoder, blocks)
    try:
        selections = decoder.selections(plan)
    except (ValueError, TypeError) as error:
        return OwnConfig({}, [*problems, str(error)])
    for kind, each in zip(("experts", "attention"), selections, strict=True):
        problems += [
            f"blocks.{number}, {kind}: the selection is a {type(selection).__name__}; "
            f"it must be one of {_names(_SELECTIONS)}"
            for number, selection in enumerate(each)
            if type(selection) not in _SELECTIONS
        ]
    if problems:
        return OwnConfig({}, problems)
    rotaries = dict.fromkeys(rotary for block in blocks if (rotary := _rotary(block)))
    places = {rotary: number for number, rotary in enumerate(rotaries)}
    fields = {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.d_model,
        "learned_positions": decoder.max_positions is not None,
        "tie_word_embeddings": decoder.tie_embeddings,
        "norm": _norm(decoder.norm),
        "rotations": [_rotation(rotary) for rotary in rotaries],
        "blocks": [
            {
                "attention": _attention(block, attends, places),
                "feed_forward": _feed_forward(block, feeds),
            }
            for block, attends, feeds in zip(
                blocks, selections.attention, selections.experts, strict=True
            )
        ],
    }
    return OwnConfig(fields, [])


def _other_classes(decoder: Decoder, blocks: list[Block]) -> list[str]:
    """Modules of a class that the own class does not hold, and norms and types that differ."""
    allowed: list[tuple[str, nn.Module, Iterable[type]]] = [
        ("the model", decoder, (Decoder,)),
        ("embedding", decoder.embedding, (TokenEmbedding,)),
        ("norm", decoder.norm, _NORMS),
        ("head", decoder.head, (TokenHead,)),
    ]
    for number, block in enumerate(blocks):
        attention, feed_forward = block.attention, block.feed_forward
        experts, shared = (
            getattr(feed_forward, "experts", None),
            getattr(feed_forward, "shared", None),
        )
        found: list[tuple[str, nn.Module | None, Iterable[type]]] = [
            ("attention_norm", block.attention_norm, _NORMS),
            ("attention", attention, _ATTENTION),
            ("attention.heads", getattr(attention, "heads", None), (HeadGroups,)),
            ("attention.router", getattr(attention, "router", None), _ROUTERS),
            ("feed_forward_norm", block.feed_forward_norm, _NORMS),
            ("feed_forward", feed_forward, _FEED_FORWARD),
            ("feed_forward.router", getattr(feed_forward, "router", None), _ROUTERS),
            ("feed_forward.experts", experts, _EXPERTS),
            ("feed_forward.shared", shared, (FeedForward,)),
            ("feed_forward.shared.experts", getattr(shared, "experts", None), (type(experts),)),
        ]
        allowed.append((f"blocks.{number}", block, (Block,)))
        allowed += [(f"blocks.{number}.{n}", part, of) for n, part, of in found if part is not None]
    problems = [
        f"{name} is a {type(module).__name__}; it must be one of {_names(classes)}"
        for name, module, classes in allowed
        if type(module) not in classes
    ]
    norms = [module for _, module, classes in allowed if classes is _NORMS]
    if not problems and any(_norm(norm) != _norm(norms[0]) for norm in norms):
        problems.append("its norms differ; they must have the same class and options")
    dtypes = {parameter.dtype for parameter in decoder.parameters()}
    if len(dtypes) > 1:
        types = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        problems.append(f"its weights are of several types ({types}); convert them to one")
    elif decoder.tie_embeddings and not _is_tied(decoder):
        problems.append("tie_embeddings=True, but its head has weights of its own")
    return problems


def _is_tied(decoder: Decoder) -> bool:
    head, embedding = decoder.head.weight, decoder.embedding.weight
    return head is embedding or head.is_meta or torch.equal(head, embedding)


def _names(classes: Iterable[type]) -> str:
    return ", ".join(each.__name__ for each in classes)


def _norm(module: nn.Module) -> Data:
    kind = type(module)
    options = {name: getattr(module, name) for name in _NORMS[kind]}
    if kind is nn.LayerNorm and options["elementwise_affine"]:
        options["bias"] = module.bias is not None
    return {"kind": kind.__name__, **options}


def _rotary(block: Block) -> Rotary | None:
    return cast(GroupedQueryAttention, block.attention).heads.rotary


def _rotation(rotary: Rotary) -> Data:
    """Frequencies as numbers, so that every scaling of them is held exactly."""
    frequencies_P: Tensor = rotary.theta ** (
        -torch.arange(0, rotary.d_rotary, 2, dtype=torch.float32) / rotary.d_rotary
    )
    factor = 1.0
    if rotary.scaling is not None:
        frequencies_P = rotary.scaling.frequencies(frequencies_P)
        factor = rotary.scaling.attention_factor
    return {"frequencies": frequencies_P.tolist(), "factor": factor}


def _attention(block: Block, selection: Selection, places: dict[Rotary, int]) -> Data:
    layer = cast(GroupedQueryAttention | MixtureOfAttentionHeads, block.attention)
    rotary = layer.heads.rotary
    return {
        "n_groups": len(layer.heads.w_q()),
        "n_kv_heads": layer.n_kv_heads,
        "d_head": layer.d_head,
        "rotation": None if rotary is None else places[rotary],
        "qk_norm": layer.qk_norm,
        "norm_eps": layer.norm_eps,
        "bias": layer.heads.b_q is not None,
        "output_bias": layer.heads.b_o is not None,
        "mixture": _mixture(layer, selection),
    }


def _feed_forward(block: Block, selection: Selection) -> Data:
    layer = cast(FeedForward | MixtureOfExperts, block.feed_forward)
    experts: Experts = layer.experts
    return {
        "kind": _EXPERTS[cast(Any, type(experts))],
        "n_experts": len(experts.w_in()),
        "d_expert": experts.d_expert,
        "activation": experts.activation,
        "bias": experts.bias,
        "d_shared": getattr(layer, "d_shared", 0),
        "shared_gate": getattr(layer, "shared_gate", None) is not None,
        "mixture": _mixture(layer, selection),
    }


def _mixture(layer: nn.Module, selection: Selection) -> Data | None:
    if not isinstance(layer, MixtureOfExperts | MixtureOfAttentionHeads):
        return None
    kind = _ROUTERS[cast(Any, type(layer.router))]
    hidden = {} if kind == "linear" else {"d_hidden": layer.router.d_hidden}
    remaining = layer.remaining
    return {
        "n_experts": layer.n_experts,
        "router": {"kind": kind, **hidden},
        "gate_factor": layer.gate_factor,
        "remaining": None if remaining is None else remaining.tolist(),
        "selection": {"kind": type(selection).__name__, **asdict(selection)},
    }
