"""What the configuration of any family says, in one form, and the decoder that fits it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_dsmoe.attention import GroupedQueryAttention, MixtureOfAttentionHeads
from lightning_dsmoe.attention.head_groups import QKNorm
from lightning_dsmoe.decoder import AttentionFactory, Decoder, FeedForwardFactory
from lightning_dsmoe.experts import FeedForward, GLUExperts, MixtureOfExperts, MLPExperts
from lightning_dsmoe.hugging_face.rope import Rope
from lightning_dsmoe.routing import AllExperts, SelectionPlan, TopK


@dataclass(frozen=True)
class Mixture:
    """The mixture of a published model.

    Args:
        n_experts: number of experts.
        k: experts that run for a token.
        renormalize: whether their gates are made to sum to one.
        d_expert: hidden units of one expert.
        d_shared: hidden units of the shared expert, 0 for none.
        shared_gate: whether the shared expert has a gate.
        attention: whether query heads are experts as well.
        dense_layers: layers that have a dense feed-forward layer instead.
    """

    n_experts: int
    k: int
    renormalize: bool
    d_expert: int
    d_shared: int = 0
    shared_gate: bool = False
    attention: bool = False
    dense_layers: frozenset[int] = frozenset()

    @property
    def plan(self) -> SelectionPlan:
        """What the published model runs."""
        top_k = TopK(self.k, renormalize=self.renormalize)
        return SelectionPlan(top_k, top_k if self.attention else AllExperts())


@dataclass(frozen=True)
class Multipliers:
    """Constants of the forward pass that Granite has, which weights can take up."""

    embedding: float = 1.0
    attention: float | None = None
    residual: float = 1.0
    logits: float = 1.0


@dataclass(frozen=True)
class SourceModel:
    """The architecture of a model of transformers.

    Args:
        family: its `model_type`.
        vocab_size: number of tokens.
        d_model: width.
        n_layers: number of blocks.
        n_heads: query heads.
        n_kv_heads: key and value heads.
        d_head: head width.
        d_hidden: hidden units of a dense feed-forward layer.
        max_positions: longest context that it was trained for.
        norm_eps: epsilon of all norms.
        tie_embeddings: whether the head shares the weights of the embeddings.
        activation: by our name.
        rope: rotary positions; None for learned ones.
        qk_norm: of queries and keys, as in `GroupedQueryAttention`.
        bias: whether the query, key and value projections have biases.
        output_bias: whether the output projection has.
        expert_bias: whether the feed-forward projections have.
        glu: whether they are gated, and the norms are RMSNorm.
        mixture: the experts of a published mixture; None for a dense model.
        multipliers: constants that weights take up.
    """

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_hidden: int
    max_positions: int
    norm_eps: float
    tie_embeddings: bool
    activation: str
    rope: Rope | None
    qk_norm: QKNorm = False
    bias: bool = False
    output_bias: bool = False
    expert_bias: bool = False
    glu: bool = True
    mixture: Mixture | None = None
    multipliers: Multipliers = field(default_factory=Multipliers)

    @property
    def plan(self) -> SelectionPlan:
        """The plan that the source runs: the top k of a mixture, all of a dense model."""
        return SelectionPlan() if self.mixture is None else self.mixture.plan

    @property
    def n_weights_at_least(self) -> int:
        """A number of weights that it has in any case, without building it."""
        routed = self.mixture.n_experts * self.mixture.d_expert if self.mixture else self.d_hidden
        dense = len(self.mixture.dense_layers) if self.mixture else 0
        attention = self.n_layers * self.n_heads * self.d_head
        feed_forward = (self.n_layers - dense) * routed + dense * self.d_hidden
        return self.d_model * (self.vocab_size + attention + feed_forward)


def build(source: SourceModel, n_experts: int | None) -> Decoder:
    """The decoder of a model, on the meta device.

    A dense model becomes a mixture: its neurons are split among `n_experts`, and query heads that
    share a KV head become attention experts.

    Args:
        source: the model.
        n_experts: experts of each feed-forward layer of a dense model, as `check_n_experts` wants
            it; None for a mixture.
    """
    norm: Any = nn.RMSNorm if source.glu else nn.LayerNorm
    with torch.device("meta"):
        return Decoder(
            source.vocab_size,
            source.d_model,
            source.n_layers,
            attention=_attention(source),
            feed_forward=_feed_forward(source, n_experts),
            norm=partial(norm, eps=source.norm_eps),
            max_positions=source.max_positions if source.rope is None else None,
            tie_embeddings=source.tie_embeddings,
        ).eval()


def check_n_experts(source: SourceModel, n_experts: int | None) -> None:
    """Raise a ValueError unless a number of experts fits a model."""
    if source.mixture is not None:
        if n_experts is not None:
            raise ValueError(
                f"{source.family} has {source.mixture.n_experts} experts already, n_experts is for "
                f"dense models; got n_experts={n_experts}"
            )
        return
    width = source.d_hidden
    if n_experts is None:
        raise ValueError(
            f"{source.family} is dense: give n_experts, into how many experts its feed-forward "
            f"layers of {width} neurons are split, such as {_nearest_divisor(width, 8)}"
        )
    if n_experts < 1 or width % n_experts:
        raise ValueError(
            f"n_experts must divide the {width} neurons of a feed-forward layer, got {n_experts}; "
            f"the nearest that does is {_nearest_divisor(width, n_experts)}"
        )


def _nearest_divisor(width: int, n_experts: int) -> int:
    divisors = (n for n in range(1, min(width, 4096) + 1) if width % n == 0)
    return min(divisors, key=lambda n: abs(n - n_experts))


def _attention(source: SourceModel) -> AttentionFactory:
    n_groups = source.n_heads // source.n_kv_heads
    options: dict[str, Any] = {
        "qk_norm": source.qk_norm,
        "norm_eps": source.norm_eps if source.qk_norm else None,
        "bias": source.bias,
        "output_bias": source.output_bias,
        "rope_theta": None if source.rope is None else source.rope.theta,
        "rope_scaling": None if source.rope is None else source.rope.scaling,
    }
    mixture = source.mixture
    if (mixture is None and n_groups > 1) or (mixture is not None and mixture.attention):
        return partial(
            MixtureOfAttentionHeads,
            n_experts=n_groups if mixture is None else mixture.n_experts,
            n_heads=source.n_kv_heads,
            d_head=source.d_head,
            gate_scale="mean_one" if mixture is None else "sum_to_one",
            **options,
        )
    return partial(
        GroupedQueryAttention,
        n_heads=source.n_heads,
        n_kv_heads=source.n_kv_heads,
        d_head=source.d_head,
        **options,
    )


def _feed_forward(
    source: SourceModel, n_experts: int | None
) -> FeedForwardFactory | list[FeedForwardFactory]:
    experts: Callable[..., Any] = partial(
        GLUExperts if source.glu else MLPExperts,
        activation=source.activation,
        bias=source.expert_bias,
    )
    mixture = source.mixture
    if mixture is None:
        assert n_experts is not None
        d_expert = source.d_hidden // n_experts
        return partial(MixtureOfExperts, n_experts=n_experts, d_expert=d_expert, experts=experts)
    routed = partial(
        MixtureOfExperts,
        n_experts=mixture.n_experts,
        d_expert=mixture.d_expert,
        experts=experts,
        d_shared=mixture.d_shared,
        shared_gate=mixture.shared_gate,
        gate_scale="sum_to_one",
    )
    if not mixture.dense_layers:
        return routed
    dense = partial(FeedForward, d_hidden=source.d_hidden, experts=experts)
    return [dense if n in mixture.dense_layers else routed for n in range(source.n_layers)]
