"""The experts that run for each token of a sample text.

Shapes: T tokens, E experts.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dsmoe.inference import SparseModel
from lightning_dsmoe.metrics import active_masks
from lightning_dsmoe.routing import SelectionPlan


class SampleRouting(NamedTuple):
    """A sample text and the experts that run for each of its tokens.

    Args:
        tokens: token numbers.
        layers: of each routed layer bool `[T, E]`, by name.
        left_out: number of further tokens, which were not read.
    """

    tokens: list[int]
    layers: Mapping[str, Tensor]
    left_out: int

    @property
    def n_running_T(self) -> Tensor:
        """Number of experts that run for each token, over all layers and both kinds."""
        return torch.stack([mask.sum(-1) for mask in self.layers.values()]).sum(0)


@torch.inference_mode()
def sample_routing(
    model: SparseModel, plan: SelectionPlan, tokens_T: Tensor, *, context: int, most: int
) -> SampleRouting:
    """Run a sample text through a model.

    Args:
        model: the model.
        plan: the experts that run.
        tokens_T: the text.
        context: length of the windows that a longer text is split into.
        most: most tokens to read.

    Raises:
        ValueError: if the text is empty.
    """
    if not len(tokens_T):
        raise ValueError("a sample must be at least one token long, got an empty text")
    read_T = tokens_T[:most]
    windows = [
        active_masks(model(window_T[None], plan).routings, plan, model.decoder)
        for window_T in read_T.split(context)
    ]
    layers = {name: torch.cat([each[name][0].cpu() for each in windows]) for name in windows[0]}
    return SampleRouting(read_T.tolist(), layers, len(tokens_T) - len(read_T))
