"""One new token of each of a few sequences through a decoder, in constant shapes.

Shapes: B sequences, one new token of each; D model width, S slots of the cache in use, H KV heads,
C head width, V vocabulary.
"""

from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_dsmoe.decoder import Block, Decoder
from lightning_dsmoe.inference.engine.decode.step import BlockStep, EmbedStep
from lightning_dsmoe.inference.engine.decode_cuda import layers
from lightning_dsmoe.inference.engine.decode_cuda.products import Products
from lightning_dsmoe.routing import SelectionPlan

_MOST_GRAPHS = 1024
_OPTIONS: dict[str, Any] = {"coordinate_descent_tuning": True}

P = ParamSpec("P")
R = TypeVar("R")


class StaticStep(nn.Module):
    """The step of decoding without anything that the host has to know of its tensors.

    Args:
        decoder: the packed decoder.
        plan: the experts that run in each layer.
        products: the way to multiply.
        compiled: compile the pieces of the step. Blocks that differ in their weights alone share
            theirs, since weights are inputs of a compiled piece.

    Raises:
        TypeError: if a layer is not one of this library.
    """

    def __init__(
        self, decoder: Decoder, plan: SelectionPlan, products: Products, *, compiled: bool
    ) -> None:
        super().__init__()
        blocks = zip(cast(Iterable[Block], decoder.blocks), *decoder.selections(plan), strict=True)
        self.blocks = [BlockStep(*each) for each in blocks]
        self.parts = EmbedStep(decoder)
        self.decoder = decoder
        self.products = products
        piece = _compiled if compiled else _as_it_is
        self._embed = piece(layers.embed)
        self._before_attention = piece(layers.before_attention)
        self._after_attention = piece(layers.after_attention)
        self._predict = piece(layers.predict)

    def forward(
        self,
        tokens_B: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        seen_SB: Tensor,
        at_1: Tensor,
    ) -> Tensor:
        """Logits `[B, V]`; keys and values `[S, B, H, C]` of each layer are written to slot `at_1`.

        Args:
            tokens_B: int64.
            keys: of each layer.
            values: of each layer.
            seen_SB: bool, the slots that hold a token and not padding, the new ones among them.
            at_1: int64, where the new tokens go.
        """
        decoder, parts = self.decoder, self.parts
        tables = decoder.embedding, decoder.positions, parts.rotaries
        x_BD, *angles = self._embed(*tables, tokens_B, seen_SB.sum(0) - 1)
        for step, keys_SBHC, values_SBHC, own in zip(
            self.blocks, keys, values, parts.angles_of, strict=True
        ):
            inputs = self._before_attention(
                step.block, step.attention, x_BD, tuple(angles[own]), self.products
            )
            heads_BHKC = layers.attend(inputs, keys_SBHC, values_SBHC, seen_SB, at_1)
            x_BD = self._after_attention(
                step.block, step.experts, x_BD, heads_BHKC, inputs.slots, self.products
            )
        return self._predict(decoder.norm, decoder.head, x_BD, self.products)


def _as_it_is(piece: Callable[P, R]) -> Callable[P, R]:
    return piece


def _compiled(piece: Callable[P, R]) -> Callable[P, R]:
    """A function compiled as a whole for constant shapes.

    The option makes sums over products of the projections of one token, which read weights faster
    than a BLAS does, and tries block sizes for every kernel. Each kind of block, plan and number of
    sequences is one more graph of the same function, of which Dynamo would refuse the ninth.
    """
    compiled: Callable[P, R] = torch.compile(piece, fullgraph=True, dynamic=False, options=_OPTIONS)
    limits = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), _MOST_GRAPHS)

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.compiler.config.patch(limits):  # type: ignore[attr-defined]  # made on import
            return compiled(*args, **kwargs)

    return run
