"""A decoder-only transformer with interchangeable layers.

Shapes: B sequences in a batch, T positions, D width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_dsmoe.attention import Attention, KVCache
from lightning_dsmoe.attention.attention import attention_scope
from lightning_dsmoe.experts import FeedForwardLayer
from lightning_dsmoe.routing import (
    AllExperts,
    RoutedLayer,
    Routing,
    Selection,
    SelectionPlan,
    interception,
)
from lightning_dsmoe.routing import Routings as Routings
from lightning_dsmoe.routing.interception import Pinned, Scope
from lightning_dsmoe.routing.plan import check_plan
from lightning_dsmoe.routing.routing import Kind, block_layer_name


class DecoderOutput(NamedTuple):
    """Logits `[B, T, V]` and the routing of every layer."""

    logits: Tensor
    routings: Routings


_ALL_EXPERTS = SelectionPlan()  # made here, since torch.compile cannot trace the making of one


class BlockOutput(NamedTuple):
    """Tokens `[B, T, D]` after a block, and the routing of its two layers."""

    x: Tensor
    experts: Routing | None
    attention: Routing | None


class BlockSelections(NamedTuple):
    """The experts that run in each block of a decoder."""

    experts: tuple[Selection, ...]
    attention: tuple[Selection, ...]


class AttentionFactory(Protocol):
    """Makes the attention of one block."""

    def __call__(self, d_model: int) -> Attention:
        """Make a layer for tokens of width `d_model`."""


class FeedForwardFactory(Protocol):
    """Makes the feed-forward layer of one block."""

    def __call__(self, d_model: int) -> FeedForwardLayer:
        """Make a layer for tokens of width `d_model`."""


class NormFactory(Protocol):
    """Makes a normalisation."""

    def __call__(self, normalized_shape: int) -> nn.Module:
        """Make a normalisation over the last dimension, of that size."""


Factory = TypeVar("Factory", AttentionFactory, FeedForwardFactory)


class Block(nn.Module):
    """Attention, then a feed-forward layer, each on a normalised residual stream.

    Args:
        d_model: width D of the tokens.
        attention: makes the attention layer.
        feed_forward: makes the feed-forward layer.
        norm: makes the two normalisations.
        dropout: probability of dropping an output of either layer.
    """

    def __init__(
        self,
        d_model: int,
        *,
        attention: AttentionFactory,
        feed_forward: FeedForwardFactory,
        norm: NormFactory = nn.RMSNorm,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm = norm(d_model)
        self.attention = attention(d_model)
        self.feed_forward_norm = norm(d_model)
        self.feed_forward = feed_forward(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        experts: Selection = AllExperts(),
        attention: Selection = AllExperts(),
        *,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> BlockOutput:
        """Transform tokens `[B, T, D]` with the selected experts of both layers."""
        attended = self.attention(self.attention_norm(x), attention, mask=mask, cache=cache)
        x = x + self.dropout(attended.output)
        fed = self.feed_forward(self.feed_forward_norm(x), experts)
        return BlockOutput(x + self.dropout(fed.output), fed.routing, attended.routing)


class TokenEmbedding(nn.Embedding):
    """An embedding initialised with a standard deviation of 0.02, so that a head can share it."""

    def reset_parameters(self) -> None:
        """Draw new weights."""
        nn.init.normal_(self.weight, std=0.02)


class TokenHead(nn.Linear):
    """The projection to the vocabulary, initialised like the embedding that it may share."""

    def reset_parameters(self) -> None:
        """Draw new weights."""
        nn.init.normal_(self.weight, std=0.02)


class Decoder(nn.Module):
    """A decoder-only transformer: embeddings, a stack of blocks, a norm and a head.

    Args:
        vocab_size: number of tokens V of the vocabulary.
        d_model: width D.
        n_layers: number of blocks.
        attention: makes the attention of a block, called as `attention(d_model)`; a list has one
            for each block.
        feed_forward: makes its feed-forward layer, called as `feed_forward(d_model)`; a list has
            one for each block.
        norm: makes a normalisation, called as `norm(d_model)`.
        max_positions: size of a learned table of positions added to the embeddings, and thus the
            longest context; None for no such table, as with rotary positions.
        tie_embeddings: whether the head shares the weights of the embeddings.
        dropout: probability of dropping embeddings and layer outputs in training.
        checkpoint_activations: recompute each block in the backward pass to save memory; without
            effect with caches.

    Raises:
        ValueError: if a size is below 1, dropout is not in [0, 1), attention is not causal, or a
            list has not one factory for each block.

    Examples:
        >>> import torch
        >>> from functools import partial
        >>> from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts
        >>> decoder = Decoder(
        ...     256,
        ...     64,
        ...     2,
        ...     attention=partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=16),
        ...     feed_forward=partial(MixtureOfExperts, n_experts=8, d_expert=32),
        ... )
        >>> logits, routings = decoder(torch.randint(256, (1, 10)))
        >>> logits.shape, len(routings.experts)
        (torch.Size([1, 10, 256]), 2)
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_layers: int,
        *,
        attention: AttentionFactory | Sequence[AttentionFactory],
        feed_forward: FeedForwardFactory | Sequence[FeedForwardFactory],
        norm: NormFactory = nn.RMSNorm,
        max_positions: int | None = None,
        tie_embeddings: bool = True,
        dropout: float = 0.0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        if min(vocab_size, d_model, n_layers, 1 if max_positions is None else max_positions) < 1:
            raise ValueError(
                "vocab_size, d_model, n_layers and max_positions must be at least 1, "
                f"got {vocab_size}, {d_model}, {n_layers} and {max_positions}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.n_layers = n_layers
        self.max_positions = max_positions
        self.tie_embeddings = tie_embeddings
        self.checkpoint_activations = checkpoint_activations
        self.embedding = TokenEmbedding(vocab_size, d_model)
        self.positions = None if max_positions is None else TokenEmbedding(max_positions, d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(d_model, attention=attend, feed_forward=feed, norm=norm, dropout=dropout)
            for attend, feed in zip(
                _of_each_layer("attention", attention, n_layers),
                _of_each_layer("feed_forward", feed_forward, n_layers),
                strict=True,
            )
        )
        if not all(getattr(block.attention, "causal", True) for block in self._blocks):
            raise ValueError("a decoder needs causal attention, got causal=False")
        self.norm = norm(d_model)
        self.head = TokenHead(d_model, vocab_size, bias=False)
        self._tie()

    def _tie(self) -> None:
        if self.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tie()  # `to_empty` and the like make two parameters of a shared one
        return self

    @property
    def _blocks(self) -> Iterable[Block]:
        return cast(Iterable[Block], self.blocks)

    @property
    def plan_sizes(self) -> tuple[list[int | None], list[int | None]]:
        """Number of feed-forward and of attention experts of each block, None without a router."""
        return (
            [getattr(block.feed_forward, "n_experts", None) for block in self._blocks],
            [getattr(block.attention, "n_experts", None) for block in self._blocks],
        )

    def selections(self, plan: SelectionPlan) -> BlockSelections:
        """What a plan means for each block.

        Layers of a class of your own that is no `RoutedLayer` take the default of their kind.

        Raises:
            ValueError: if the plan does not fit.
            TypeError: if it is none.
        """
        check_plan(plan)
        layers = {
            block_layer_name(number, kind): layer
            for number, block in enumerate(self._blocks)
            for kind, layer in _layers_by_kind(block)
            if isinstance(layer, RoutedLayer)
        }
        found = plan.selections(layers)

        def of_blocks(kind: Kind, default: Selection) -> tuple[Selection, ...]:
            names = (block_layer_name(number, kind) for number in range(self.n_layers))
            return tuple(found.get(name, default) for name in names)

        return BlockSelections(
            of_blocks("experts", plan.experts), of_blocks("attention", plan.attention)
        )

    def forward(
        self,
        tokens: Tensor,
        plan: SelectionPlan | None = None,
        *,
        mask: Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
    ) -> DecoderOutput:
        """Logits of the token after each token.

        Args:
            tokens: `[B, T]`, integers below V; with caches, those that follow the tokens in them.
            plan: the experts that run in each layer; None runs the default of each, which is all
                but in a sparse model. An open `run_plan` holds instead.
            mask: bool `[B, T]`, false for padding (on the left); None for no padding.
            caches: one KV cache per layer, to which the new tokens are added.

        Returns:
            Logits `[B, T, V]` and the routing of every layer.

        Raises:
            ValueError: if the plan does not fit the model or the context is too long.
            TypeError: if the plan is no `SelectionPlan`.
        """
        selections = self.selections(_ALL_EXPERTS if plan is None else plan)
        scope = interception.scope() if interception.is_open else None
        x = self.dropout(self.embed(tokens, mask=mask, caches=caches))
        experts, attention = [], []
        recompute = self.checkpoint_activations and caches is None and torch.is_grad_enabled()
        for layer, block in enumerate(self._blocks):
            run = partial(checkpoint, block, use_reentrant=False) if recompute else block
            cache = None if caches is None else caches[layer]
            chosen: Any = [selections.experts[layer], selections.attention[layer]]
            if scope is not None:
                chosen = _pinned(scope, block, *chosen)
            out = run(x, *chosen, mask=mask, cache=cache)
            if scope is not None:
                _record(scope, block, out, *chosen)
            x = out.x
            experts.append(out.experts)
            attention.append(out.attention)
        return DecoderOutput(self.head(self.norm(x)), Routings(tuple(experts), tuple(attention)))

    def embed(
        self, tokens: Tensor, *, mask: Tensor | None = None, caches: Sequence[KVCache] | None = None
    ) -> Tensor:
        """Embeddings `[B, T, D]` of new tokens, with learned positions where the model has them.

        Args:
            tokens: `[B, T]`, those that follow the tokens in the caches.
            mask: bool `[B, T]`, false for padding; None for no padding.
            caches: one KV cache per layer.

        Raises:
            ValueError: if there are more tokens than learned positions, or the tokens are not
                integers `[B, T]` below V.
        """
        try:
            x: Tensor = self.embedding(tokens)
        except (IndexError, RuntimeError):
            self._check_tokens(tokens)
            raise
        if tokens.ndim != 2:
            raise ValueError(
                f"tokens must be [B, T], got {tuple(tokens.shape)}; tokens[None] is a batch of one"
            )
        if self.positions is None:
            return x
        seen = x.shape[1] + (caches[0].length if caches else 0)
        if self.max_positions is not None and seen > self.max_positions:
            raise ValueError(
                f"{seen} tokens, but this model has {self.max_positions} learned positions"
            )
        scope = attention_scope(x, mask, caches[0] if caches else None)
        placed: Tensor = x + self.positions(scope.positions_BT)
        return placed

    def _check_tokens(self, tokens: Tensor) -> None:
        """Raise a ValueError that names what is wrong with tokens; only a CPU reads values."""
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens must be int64 or int32, got {tokens.dtype}")
        if tokens.device.type == "cpu":
            for token in (int(tokens.min()), int(tokens.max())):
                if not 0 <= token < self.vocab_size:
                    raise ValueError(f"token {token} is not in 0 to {self.vocab_size - 1}")

    def new_caches(self, batch_size: int, capacity: int) -> list[KVCache]:
        """Empty KV caches, one per layer, for `batch_size` sequences of `capacity` tokens."""
        weight = self.embedding.weight
        new_cache = partial(KVCache, device=weight.device, dtype=weight.dtype)
        layers = [block.attention for block in self._blocks]
        return [new_cache(batch_size, a.n_kv_heads, capacity, a.d_head) for a in layers]


def _of_each_layer(name: str, given: Factory | Sequence[Factory], n_layers: int) -> list[Factory]:
    """The factory of each layer, from one for all or a list."""
    if not isinstance(given, Sequence):
        return [given] * n_layers
    if len(given) != n_layers:
        raise ValueError(
            f"{name} must be one for all layers or one for each, got {len(given)} for {n_layers}"
        )
    return list(given)


def _layers_by_kind(block: Block) -> tuple[tuple[Kind, nn.Module], ...]:
    """The two layers of a block, in the order in which they run."""
    return ("attention", block.attention), ("experts", block.feed_forward)


def _pinned(
    scope: Scope, block: Block, experts: Selection, attention: Selection
) -> list[Selection | Pinned]:
    """The selections that hold for a block's layers, which need not ask for them again.

    So a compiled block stays one graph, and one that is recomputed runs what it ran before.
    """
    return [
        Pinned(scope.selection(layer, layer.wanted(given)))
        if isinstance(layer, RoutedLayer)
        else given
        for layer, given in ((block.feed_forward, experts), (block.attention, attention))
    ]


def _record(
    scope: Scope,
    block: Block,
    out: BlockOutput,
    experts: Selection | Pinned,
    attention: Selection | Pinned,
) -> None:
    for layer, routing, chosen in (
        (block.feed_forward, out.experts, experts),
        (block.attention, out.attention, attention),
    ):
        if isinstance(chosen, Pinned):
            scope.record(layer, routing, chosen.selection)
