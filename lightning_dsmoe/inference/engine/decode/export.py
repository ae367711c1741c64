"""The decode step as one file that PyTorch runs by itself.

Shapes: T sequences, one new token of each; S tokens in the cache, H KV heads, C head width, V
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
from lightning_dsmoe.inference.engine.decode.compiled_step import compiling
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
        layers = zip(
            cast(Iterable[Block], decoder.blocks), plan.experts, plan.attention, strict=True
        )
        self.blocks = nn.ModuleList(BlockStep(*layer) for layer in layers)
        self.embed = EmbedStep(decoder)
        self.predict = PredictStep(decoder)

    def forward(
        self,
        tokens_T: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        seen_ST: Tensor,
        at_1: Tensor,
    ) -> Tensor:
        """Logits `[T, V]`; the caches of each layer, `[S, T, H, C]`, are added to at slot `at_1`.

        Args:
            tokens_T: int64.
            keys: of each layer.
            values: of each layer.
            seen_ST: bool, the slots that hold a token; that of the new ones is added.
            at_1: int64, where the new tokens go.
        """
        seen_ST.index_fill_(0, at_1, True)
        x_TD, *by = self.embed(tokens_T, seen_ST)
        for block, keys_STHC, values_STHC in zip(self.blocks, keys, values, strict=True):
            x_TD = block(x_TD, keys_STHC, values_STHC, seen_ST, at_1, *by)
        logits_TV: Tensor = self.predict(x_TD)
        return logits_TV


def export_step(decoder: Decoder, plan: SelectionPlan, path: Path, n_sequences: int) -> None:
    """Compile the decode step with its weights into a `.pt2` file, whole or not at all.

    Args:
        decoder: the packed decoder, its weights as the step likes them.
        plan: the experts that run in each layer.
        path: the file.
        n_sequences: number of sequences T.

    Raises:
        CannotCompile: if there is no working compiler, or a layer is not one of this library.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with compiling(), Console(stderr=True).status("Compiling the whole decode step"):
        compile_kernel(_exported(WholeStep(decoder, plan), decoder, n_sequences), path)


def _exported(step: WholeStep, decoder: Decoder, n_sequences: int) -> torch.export.ExportedProgram:
    slots = DecoderCache(decoder, n_sequences, 64).next_slots()
    tokens_T = torch.zeros(n_sequences, dtype=torch.long, device=slots.at_1.device)
    size = {0: Dim("capacity", min=2, max=2**30)}
    layers = [size] * decoder.n_layers
    return torch.export.export(
        step,
        (tokens_T, slots.keys, slots.values, slots.seen_ST, slots.at_1),
        dynamic_shapes=(None, layers, layers, size, None),
    )
