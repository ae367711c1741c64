"""Decoders of every kind that the own class holds, each with a plan."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_dsmoe import (
    AllExperts,
    Decoder,
    GLUExperts,
    GroupedQueryAttention,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
    SelectionPlan,
    Threshold,
    TopK,
)
from lightning_dsmoe.attention import Llama3RopeScaling, YarnRopeScaling
from lightning_dsmoe.experts import FeedForward
from lightning_dsmoe.hugging_face.own_class import write_own_class
from lightning_dsmoe.routing import CosineRouter, MLPRouter, ThresholdTopK, TopP
from lightning_dsmoe.serialization.pruning import Remaining, remove_experts

VOCABULARY, D_MODEL, N_LAYERS = 61, 24, 3


class Case(NamedTuple):
    """A decoder and the experts that run."""

    decoder: Decoder
    plan: SelectionPlan


def decoder(attention: Any, feed_forward: Any, **options: Any) -> Decoder:
    """A decoder whose every weight is drawn, biases and norms too."""
    made = Decoder(
        VOCABULARY,
        D_MODEL,
        N_LAYERS,
        attention=attention,
        feed_forward=feed_forward,
        **options,
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.eval()


def swiglu(**options: Any) -> Any:
    return partial(GLUExperts, activation="silu", **options)


def mixtures() -> Case:
    """Both kinds of experts with biases, raw gates, another selection in each layer."""
    heads = partial(
        MixtureOfAttentionHeads, n_experts=3, n_heads=2, d_head=6, bias=True, qk_norm=True
    )
    experts = partial(
        MixtureOfExperts, n_experts=5, d_expert=7, experts=swiglu(bias=True), d_shared=6
    )
    plan = SelectionPlan(
        experts=Threshold(0.8),
        attention=TopK(2),
        layers={"blocks.1.feed_forward": TopP(0.6), "blocks.2.attention": AllExperts()},
    )
    return Case(decoder(heads, experts, tie_embeddings=False), plan)


def gpt() -> Case:
    """Learned positions, LayerNorm, renormalised gates."""
    attention = partial(GroupedQueryAttention, n_heads=4, n_kv_heads=4, d_head=6, rope_theta=None)
    mlp = partial(MixtureOfExperts, n_experts=4, d_expert=9)
    made = decoder(attention, mlp, norm=nn.LayerNorm, max_positions=90)
    return Case(made, SelectionPlan(experts=TopK(2, renormalize=True)))


def olmoe() -> Case:
    """Layers that differ: scaled and partial rotary positions, a norm of the projection."""
    attention = partial(
        GroupedQueryAttention,
        n_heads=6,
        n_kv_heads=2,
        d_head=8,
        qk_norm="projection",
        norm_eps=1e-5,
        rope_scaling=Llama3RopeScaling(4.0, 1.0, 4.0, original_max_positions=16),
        bias=True,
        output_bias=False,
    )
    other = partial(
        GroupedQueryAttention,
        n_heads=2,
        n_kv_heads=1,
        d_head=12,
        rotary_fraction=0.5,
        rope_scaling=YarnRopeScaling(4.0, original_max_positions=16),
    )
    experts = partial(
        MixtureOfExperts, n_experts=4, d_expert=6, d_shared=5, shared_gate=True, experts=swiglu()
    )
    made = decoder(
        [attention, other, attention],
        [partial(FeedForward, d_hidden=20), experts, experts],
        norm=partial(nn.RMSNorm, eps=1e-6),
    )
    return Case(made, SelectionPlan(experts=TopK(1)))


def routers() -> Case:
    """Other routers, gates that sum to one, one number of experts for a whole batch."""
    heads = partial(
        MixtureOfAttentionHeads,
        n_experts=4,
        n_heads=1,
        d_head=6,
        router=partial(MLPRouter, d_hidden=8, init_std=1.0),
        gate_scale="sum_to_one",
    )
    experts = partial(
        MixtureOfExperts,
        n_experts=4,
        d_expert=6,
        router=partial(CosineRouter, d_hidden=8, init_scale=5.0),
        experts=partial(GLUExperts, activation="gelu_tanh"),
        gate_scale="sum_to_one",
    )
    plan = SelectionPlan(experts=ThresholdTopK(1.0), attention=Threshold(1.0, renormalize=True))
    return Case(decoder(heads, experts), plan)


def pruned() -> Case:
    """Experts of both kinds are gone."""
    heads = partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=6)
    experts = partial(MixtureOfExperts, n_experts=5, d_expert=6)
    made = decoder(heads, experts)
    remaining = Remaining(experts=((0, 2, 4), None, (1, 2)), attention=((1, 3), None, (0, 1, 3)))
    remove_experts(made, remaining)
    plan = SelectionPlan(experts=TopK(2, renormalize=True), attention=Threshold(0.9))
    return Case(made, plan)


CASES: dict[str, Callable[[], Case]] = {
    each.__name__: each for each in (mixtures, gpt, olmoe, routers, pruned)
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


@pytest.fixture
def text() -> Tensor:
    return torch.randint(VOCABULARY, (2, 23))


def exported(case: Case, folder: Path, **options: Any) -> Any:
    """The class of transformers, with the code of this library, for a decoder under a plan."""
    pytest.importorskip("transformers")
    from lightning_dsmoe.hugging_face.own_class.modeling_dsmoe import DSMoEForCausalLM

    write_own_class(case.decoder, case.plan, folder)
    model, info = DSMoEForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def assert_close(given: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the largest logit."""
    assert (given - expected).abs().max() <= 1e-5 * expected.abs().max()
