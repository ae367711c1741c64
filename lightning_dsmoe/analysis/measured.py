"""A model on data, as plans are measured on it: a language model on text, or any on batches.

Shapes: B samples in a batch, T positions, N tokens that count, E experts.
"""

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from lightning_dsmoe.analysis.held_out import HeldOut
from lightning_dsmoe.data.windows import IGNORED
from lightning_dsmoe.inference import SparseModel
from lightning_dsmoe.losses.cross_entropy import window_cross_entropy
from lightning_dsmoe.metrics import ParameterCounts, active_masks, count_parameters
from lightning_dsmoe.metrics.active_parameters import Masks
from lightning_dsmoe.routing import (
    RoutingRecord,
    SelectionPlan,
    record_routings,
    routed_layers,
    run_plan,
)
from lightning_dsmoe.routing.plan import PlannedLayer
from lightning_dsmoe.routing.running import some_routed_layers
from lightning_dsmoe.serialization.architecture import build_decoder

SampleLoss = Callable[[nn.Module, Any], Tensor]
"""Loss of every sample of a batch, `[B]`: called with the model and the batch."""
TokenMask = Callable[[Any], Tensor]
"""Tokens of a batch that count, bool, of the shape that tokens have in the routed layers."""


class Reading(NamedTuple):
    """What came of a batch under a plan.

    Args:
        losses: loss of each sample: of a text that of each window, summed over its tokens.
        n_counted: what the loss is a mean over: samples, or tokens of a text.
        seconds: how long the model and its loss took.
        active: gives the experts that ran, by layer.
        probs_NE: gives the probabilities of the tokens that count, by layer.
        mask: tokens that count; None counts all.
    """

    losses: list[float]
    n_counted: int
    seconds: float
    active: Callable[[], Masks]
    probs_NE: Callable[[], dict[str, Tensor]]
    mask: Tensor | None


class Measured(ABC):
    """A model on data."""

    counts: ParameterCounts
    """Parameters of the model."""
    layers: Mapping[str, PlannedLayer]
    """Its routed layers, by name."""

    @abstractmethod
    def read(self, plan: SelectionPlan) -> Iterator[Reading]:
        """Run the model under a plan, batch by batch."""

    @abstractmethod
    def halves(self) -> tuple[Self, Self]:
        """The model on the first and on the second half of the data.

        Raises:
            ValueError: if there is too little data for two.
        """


class MeasuredText(Measured):
    """A language model on held-out text.

    Args:
        model: the model.
        text: the text.
        counts: parameters of its decoder before it was packed; None counts them.
    """

    def __init__(
        self, model: SparseModel, text: HeldOut, counts: ParameterCounts | None = None
    ) -> None:
        self.model = model
        self.text = text
        self.layers = routed_layers(model.decoder)
        self.counts = counts or count_parameters(build_decoder(model.architecture))

    def read(self, plan: SelectionPlan) -> Iterator[Reading]:
        """Run the model under a plan, batch by batch."""
        for inputs_BT, labels_BT in self.text.batches:
            start = time.perf_counter()
            with torch.inference_mode():
                logits_BTV, routings = self.model(inputs_BT, plan)
                losses = window_cross_entropy(logits_BTV, labels_BT).tolist()
            seconds = time.perf_counter() - start
            mask_BT = labels_BT != IGNORED
            yield Reading(
                losses,
                int(mask_BT.sum()),
                seconds,
                partial(active_masks, routings, plan, self.model.decoder),
                lambda routings=routings, mask_BT=mask_BT: {  # type: ignore[misc]
                    name: each.routing.probs[mask_BT] for name, each in routings.by_name().items()
                },
                mask_BT,
            )

    def halves(self) -> tuple[Self, Self]:
        """The model on the first and on the second half of the text."""
        first, second = (type(self)(self.model, half, self.counts) for half in self.text.halves())
        return first, second


class MeasuredBatches(Measured):
    """Any model with routed layers on batches of anything.

    The batches are read once and kept, so that all plans see the same samples whatever a loader
    shuffles; `itertools.islice` takes some of many. The model is measured in evaluation mode.

    Args:
        model: the model.
        batches: such as a `DataLoader`.
        loss: gives the loss of every sample of a batch, `[B]`, called as `loss(model, batch)`.
        mask: gives the tokens of a batch that count for the active share; None counts all.
        outside: modules whose parameters are not hidden, as in `count_parameters`.

    Raises:
        ValueError: if there is no batch, the model has no routed layer or none of these modules.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: SampleLoss,
        *,
        mask: TokenMask | None = None,
        outside: Collection[str] = (),
    ) -> None:
        self.model = model
        self.layers = some_routed_layers("a plan", model)
        self.batches = list(batches)
        self.loss = loss
        self.mask = mask
        self.counts = count_parameters(model, outside=outside)
        if not self.batches:
            raise ValueError("a model is measured on one batch or more, got none")

    def read(self, plan: SelectionPlan) -> Iterator[Reading]:
        """Run the model under a plan, batch by batch.

        Raises:
            ValueError: if the loss is not that of each sample.
        """
        for number, batch in enumerate(self.batches):
            mask = None if self.mask is None else self.mask(batch)
            start = time.perf_counter()
            # No inference mode: what a model keeps of a call, such as a table, trains on later.
            with (
                evaluating(self.model),
                torch.no_grad(),
                torch.random.fork_rng(),
                run_plan(self.model, plan),
                record_routings(self.model, mask) as record,
            ):
                torch.manual_seed(number)  # of a loss that draws, so that all plans get the same
                losses = self._losses(batch)
            seconds = time.perf_counter() - start
            probs_NE = partial(_probs, record, mask)
            yield Reading(losses, len(losses), seconds, record.active_masks, probs_NE, mask)

    def halves(self) -> tuple[Self, Self]:
        """The model on the first and on the second half of the batches."""
        if len(self.batches) < 2:
            raise ValueError(
                "a plan is found on one half of the batches and judged on the other: two batches "
                f"or more are needed, got {len(self.batches)}"
            )
        middle = len(self.batches) // 2
        first, second = copy.copy(self), copy.copy(self)
        first.batches, second.batches = self.batches[:middle], self.batches[middle:]
        return first, second

    def _losses(self, batch: Any) -> list[float]:
        losses = self.loss(self.model, batch)
        if not isinstance(losses, Tensor) or losses.ndim != 1:
            given = (
                f"a tensor of shape {tuple(losses.shape)}"
                if isinstance(losses, Tensor)
                else f"{losses!r:.80}"
            )
            raise ValueError(
                "the loss function must return the loss of every sample, a tensor [B], as most do "
                f'with reduction="none"; got {given}'
            )
        return losses.tolist()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _probs(record: RoutingRecord, mask: Tensor | None) -> dict[str, Tensor]:
    found = {}
    for name, routing in record.routings.items():
        counted = record.mask_of(name, mask)
        found[name] = (
            routing.probs.flatten(0, -2) if counted is None else routing.probs[counted.bool()]
        )
    return found
