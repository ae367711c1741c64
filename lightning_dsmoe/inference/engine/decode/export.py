"""The decode step as one file that PyTorch runs by itself.

Shapes: B sequences, one new token of each; S slots of the cache, H KV heads, C head width, V
vocabulary.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.export import Dim

from lightning_dsmoe.decoder import Block, Decoder
from lightning_dsmoe.inference.engine.cache import DecoderCache
from lightning_dsmoe.inference.engine.decode.aot_cache import compile_kernel
from lightning_dsmoe.inference.engine.decode.compiled_step import (
    COMPILING,
    EXAMPLE_CAPACITY,
    compiling,
)
from lightning_dsmoe.inference.engine.decode.step import BlockStep, EmbedStep, PredictStep
from lightning_dsmoe.routing import SelectionPlan


class WholeStep(nn.Module):
    """One new token of each of a few sequences through a whole decoder.

    Args:
        decoder: the packed decoder.
        plan: the experts that run in each layer.
    """

    def __init__(self, decoder: Decoder, plan: SelectionPlan) -> None:
        super().__init__()
        layers = zip(cast(Iterable[Block], decoder.blocks), *decoder.selections(plan), strict=True)
        self.blocks = nn.ModuleList(BlockStep(*layer) for layer in layers)
        self.embed = EmbedStep(decoder)
        self.predict = PredictStep(decoder)

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
            seen_SB: bool, the slots that hold a token; that of the new ones is set.
            at_1: int64, where the new tokens go.
        """
        seen_SB.index_fill_(0, at_1, True)
        x_BD, *angles = self.embed(tokens_B, seen_SB)
        for block, keys_SBHC, values_SBHC, own in zip(
            self.blocks, keys, values, self.embed.angles_of, strict=True
        ):
            x_BD = block(x_BD, keys_SBHC, values_SBHC, seen_SB, at_1, *angles[own])
        logits_BV: Tensor = self.predict(x_BD)
        return logits_BV


def export_step(decoder: Decoder, plan: SelectionPlan, path: Path, n_sequences: int) -> None:
    """Compile the decode step with its weights into a `.pt2` file, whole or not at all.

    Args:
        decoder: the packed decoder, its weights in the layout for so many sequences.
        plan: the experts that run in each layer.
        path: the file.
        n_sequences: number of sequences B.

    Raises:
        CannotCompile: if there is no working compiler, or a layer is not one of this library.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with COMPILING, compiling(), Console(stderr=True).status("Compiling the whole decode step"):
        slots = DecoderCache(decoder, n_sequences, EXAMPLE_CAPACITY).next_slots()
        tokens_B = torch.zeros(n_sequences, dtype=torch.long, device=slots.at_1.device)
        size = {0: Dim("capacity", min=2, max=2**30)}
        layers = [size] * decoder.n_layers
        program = torch.export.export(
            WholeStep(decoder, plan),
            (tokens_B, *slots),
            dynamic_shapes=(None, layers, layers, size, None),
        )
        compile_kernel(program, path)
