from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_dsmoe import (
    AllExperts,
    Decoder,
    FeedForward,
    GLUExperts,
    GroupedQueryAttention,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
    MLPExperts,
    MLPRouter,
    SelectionPlan,
    Threshold,
    TopK,
)
from lightning_dsmoe.attention import Llama3RopeScaling
from lightning_dsmoe.hugging_face.targets import STOCK_CLASSES, choose
from lightning_dsmoe.inference import Remaining, prune

RAW, RENORMALIZED = (SelectionPlan(experts=TopK(2, renormalize=r)) for r in (False, True))
BOTH = SelectionPlan(TopK(2, renormalize=True), TopK(2, renormalize=True))


class OwnExperts(GLUExperts):
    def hidden(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.chunk(2, -1)[0]


class OwnNorm(nn.RMSNorm):
    pass


def decoder_of(
    attention: dict[str, Any] | None = None,
    feed_forward: dict[str, Any] | None = None,
    *,
    mixed: bool = False,
    **options: Any,
) -> Decoder:
    heads: Any = partial(GroupedQueryAttention, n_heads=4, n_kv_heads=2, d_head=4)
    if mixed:
        heads = partial(MixtureOfAttentionHeads, n_experts=4, n_heads=2, d_head=4)
    swiglu = partial(GLUExperts, activation="silu")
    experts = {"n_experts": 4, "d_expert": 8, "experts": swiglu, **(feed_forward or {})}
    parts: dict[str, Any] = {
        "attention": partial(heads, **(attention or {})),
        "feed_forward": partial(MixtureOfExperts, **experts),
    }
    return Decoder(32, 16, 2, **(parts | options))


jet = partial(decoder_of, mixed=True, norm=partial(nn.RMSNorm, eps=1e-6))


def differing_sizes() -> Decoder:
    decoder = decoder_of()
    decoder.blocks[1].feed_forward = MixtureOfExperts(
        16, 8, 8, experts=partial(GLUExperts, activation="silu")
    )
    return decoder


def without_a_router() -> Decoder:
    decoder = decoder_of()
    decoder.blocks[0].feed_forward = FeedForward(16, 8, experts=GLUExperts)
    return decoder


def own_experts() -> Decoder:
    return decoder_of({}, {"experts": OwnExperts})


def pruned(decoder: Decoder) -> Decoder:
    return prune(decoder, Remaining(experts=((0, 2), None), attention=(None, None)))


@pytest.mark.parametrize(
    ("decoder", "plan", "expected"),
    [
        (decoder_of, RAW, "qwen2_moe"),
        (decoder_of, RENORMALIZED, "mixtral"),
        (decoder_of, SelectionPlan(), "mixtral"),
        (decoder_of, SelectionPlan(experts=TopK(4)), "mixtral"),
        (partial(decoder_of, {"qk_norm": True}), RAW, "qwen3_moe"),
        (partial(decoder_of, {"qk_norm": "projection"}), RAW, "olmoe"),
        (partial(decoder_of, {"qk_norm": "projection", "d_head": 6}), RAW, None),
        (partial(decoder_of, {"bias": True}), RENORMALIZED, "granitemoe"),
        (partial(decoder_of, {"bias": True, "output_bias": False}), RENORMALIZED, "qwen2_moe"),
        (partial(decoder_of, {}, {"d_shared": 3}), RENORMALIZED, "granitemoeshared"),
        (partial(decoder_of, {}, {"d_shared": 3}), RAW, "qwen2_moe"),
        (
            partial(decoder_of, {}, {"d_shared": 3, "shared_gate": True}),
            RENORMALIZED,
            "qwen2_moe",
        ),
        (jet, BOTH, "jetmoe"),
        (jet, SelectionPlan(), "jetmoe"),
        (jet, SelectionPlan(TopK(2), TopK(2)), None),
        (partial(decoder_of, mixed=True), BOTH, None),  # another eps in blocks
        (decoder_of, SelectionPlan(experts=Threshold(0.5)), None),
        (decoder_of, SelectionPlan(TopK(2), layers={"blocks.1.feed_forward": TopK(1)}), None),
        (lambda: pruned(decoder_of()), SelectionPlan(), "mixtral"),
        (lambda: pruned(decoder_of()), RAW, None),
        (own_experts, RAW, None),
    ],
)
def test_auto(decoder: Callable[[], Decoder], plan: SelectionPlan, expected: str | None) -> None:
    stock = choose(decoder(), plan)
    assert (None if stock is None else stock.model_type) == expected


@pytest.mark.parametrize(
    ("to", "decoder", "plan", "message"),
    [
        ("mixtral", decoder_of, RAW, "blocks.0.feed_forward: the gates .* are raw, .*qwen2_moe"),
        ("granitemoe", decoder_of, RAW, "blocks.0.feed_forward: the gates .* are raw"),
        ("jetmoe", jet, SelectionPlan(TopK(2), TopK(2)), "attention: the gates.*--to dsmoe"),
        ("olmoe", decoder_of, RAW, r"blocks.0.attention: qk_norm=False.*whole projection"),
        ("qwen3_moe", decoder_of, RAW, r"qk_norm=False, qwen3_moe has one over each head"),
        ("mixtral", partial(decoder_of, {"qk_norm": True}), RENORMALIZED, "mixtral has none"),
        ("mixtral", partial(decoder_of, {"bias": True}), RENORMALIZED, "bias=True.*granitemoe"),
        ("mixtral", jet, BOTH, "the attention is mixture, mixtral has plain.*--to jetmoe"),
        ("jetmoe", decoder_of, RENORMALIZED, "the attention is plain"),
        ("mixtral", partial(decoder_of, {}, {"d_shared": 3}), RENORMALIZED, "no shared expert"),
        (
            "granitemoeshared",
            partial(decoder_of, {}, {"d_shared": 3, "shared_gate": True}),
            RENORMALIZED,
            "shared_gate=True",
        ),
        ("jetmoe", partial(decoder_of, mixed=True), BOTH, r"attention_norm: eps=1.19.*has 1e-06"),
        (
            "qwen3_moe",
            partial(decoder_of, {"qk_norm": True, "norm_eps": 1e-5}),
            RAW,
            r"q_norm: eps=1e-05, qwen3_moe has 1.19",
        ),
        ("qwen2_moe", differing_sizes, RAW, "experts must be the same.*4 in blocks.0.*8 in block"),
        ("jetmoe", partial(jet, {"n_experts": 2}), SelectionPlan(), "one number of experts, got 2"),
        (
            "jetmoe",
            jet,
            SelectionPlan(TopK(2, renormalize=True), TopK(1, renormalize=True)),
            "one number of experts that run, got 1 in blocks.0.attention, 2 in blocks.0.feed",
        ),
        ("qwen2_moe", own_experts, RAW, "experts is a OwnExperts, not a GLUExperts"),
        ("qwen2_moe", partial(decoder_of, {}, {"experts": MLPExperts}), RAW, "is a MLPExperts"),
        ("qwen2_moe", partial(decoder_of, {}, {"router": MLPRouter}), RAW, "is a MLPRouter"),
        (
            "qwen2_moe",
            partial(decoder_of, {}, {"experts": partial(GLUExperts, bias=True)}),
            RAW,
            "bias=True, output biases; experts of qwen2_moe have no biases",
        ),
        (
            "qwen2_moe",
            partial(decoder_of, {}, {"experts": partial(GLUExperts, activation="celu")}),
            RAW,
            "no activation 'celu'",
        ),
        ("qwen2_moe", partial(decoder_of, norm=nn.LayerNorm), RAW, "norm is a LayerNorm"),
        ("qwen2_moe", partial(decoder_of, norm=OwnNorm), RAW, "is a OwnNorm, not a RMSNorm"),
        ("qwen2_moe", partial(decoder_of, max_positions=9), RAW, "max_positions"),
        ("qwen2_moe", partial(decoder_of, {"rope_theta": None}), RAW, "rope_theta=None"),
        ("qwen2_moe", partial(decoder_of, {"rotary_fraction": 0.5}), RAW, "rotary_fraction=0.5"),
        (
            "mixtral",
            without_a_router,
            SelectionPlan(),
            "blocks.0.feed_forward is a FeedForward, mixtral has a router in every layer",
        ),
        ("qwen2_moe", decoder_of, SelectionPlan(Threshold(0.5)), "eps=0.5.*changes from token"),
        (
            "qwen2_moe",
            decoder_of,
            SelectionPlan(TopK(2), layers={"blocks.1.feed_forward": AllExperts()}),
            "experts that run must be the same in all layers, got 2 in .*, 4 in blocks.1",
        ),
        ("qwen2_moe", lambda: pruned(decoder_of()), RAW, "experts were removed"),
    ],
)
def test_refusals(
    to: Any, decoder: Callable[..., Decoder], plan: SelectionPlan, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        choose(decoder(), plan, to)
    assert "\n" not in str(raised.value)


def test_every_reason_is_named() -> None:
    decoder = decoder_of({"qk_norm": True, "bias": True}, {"router": MLPRouter}, max_positions=9)
    with pytest.raises(ValueError, match=r"to dsmoe$") as raised:
        choose(decoder, RAW, "mixtral")
    for word in ("positions", "blocks.1.feed_forward.router", "qk_norm", "output_bias", "raw"):
        assert word in str(raised.value)


def test_the_own_class_and_unknown_ones() -> None:
    assert choose(decoder_of(), RAW, "dsmoe") is None
    with pytest.raises(ValueError, match=r"to must be one of auto, .*got 'llama'"):
        choose(decoder_of(), RAW, "llama")  # type: ignore[arg-type]


def test_rope_scaling_fits_all() -> None:
    scaling = Llama3RopeScaling(8.0, 1.0, 4.0, 64)
    stock = choose(decoder_of({"rope_scaling": scaling}), RAW)
    assert stock in STOCK_CLASSES
