"""Optimizer steps whose loss or gradient is not finite: found once a step, and told in detail."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_dsmoe.finite import is_finite, not_finite, total_norm
from lightning_dsmoe.routing import interception
from lightning_dsmoe.training.layer_values import (
    Largest,
    by_layer,
    not_finite_names,
    of_gradients,
    record_outputs,
)
from lightning_dsmoe.training.undisturbed import fresh_copies, metrics_of, undisturbed


class StepLosses:
    """The losses of the batches of one optimizer step.

    They are looked at when all are there: a device would otherwise be waited for in each batch.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin a step."""
        self.batch: Any = None
        """The last batch, and the only one that is kept."""
        self._losses: list[tuple[int, Tensor, Mapping[str, Tensor]]] = []

    def add(
        self, batch_idx: int, batch: Any, loss: Tensor, terms: Mapping[str, Tensor] | None = None
    ) -> None:
        """Note the loss of a batch, and perhaps the terms that it is made of."""
        self.batch = batch
        details = {name: term.detach() for name, term in (terms or {}).items()}
        self._losses.append((batch_idx, loss.detach(), details))

    def all_finite(self) -> bool:
        """Whether all are finite; true for none."""
        losses = [loss.reshape(()) for _, loss, _ in self._losses]
        return not losses or bool(torch.isfinite(torch.stack(losses)).all())

    def first_not_finite(self, step: int) -> str:
        """What to say of the first loss that is not finite; "" if there is none."""
        for batch_idx, loss, terms in self._losses:
            if not torch.isfinite(loss):
                listed = ", ".join(f"{name} {term.item():.4g}" for name, term in terms.items())
                where = f"step {step}, batch {batch_idx}"
                return f"the loss is {loss.item()} at {where}" + (f" ({listed})" if listed else "")
        return ""


def gradient_norm(optimizer: Optimizer) -> Tensor | None:
    """Norm of all gradients of an optimizer; None if there are none."""
    found = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    return total_norm(found) if found else None


def problem_of(module: LightningModule, losses: StepLosses, norm: Tensor) -> str:
    """What is not finite in a step, in one line; "" if all is. Call on all ranks, or on none.

    Args:
        module: the module that trains.
        losses: those of the batches of the step.
        norm: that of the gradient.
    """
    # Ranks ask each other about shards, so all do, whatever the losses of each.
    finite = is_finite(norm)
    if finite and losses.all_finite():
        return ""
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    names = "" if finite else not_finite(gradients)
    trainer: Any = module.trainer
    return losses.first_not_finite(module.global_step) or (
        f"the gradient is not finite at step {module.global_step}, batch "
        f"{trainer.fit_loop.batch_idx} ({names or 'its norm'})"
    )


def of_all_ranks(trainer: Trainer, losses: StepLosses, problem: str) -> tuple[str, str]:
    """What is not finite on which ranks, and where a batch of theirs stands in the data.

    Call on all ranks, of which at least one has a problem. Gradients may be shared, so ranks whose
    own loss is not finite are named alone.

    Args:
        trainer: the Trainer.
        losses: those of the batches of the step on this rank.
        problem: what `problem_of` said on this rank.
    """
    mine = (problem, position(trainer), losses.all_finite())
    if trainer.world_size == 1:
        return mine[:2]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    bad = {rank: each for rank, each in enumerate(told) if each[0]}
    causes = {rank: each for rank, each in bad.items() if not each[2]} or bad
    said, where, _ = next(iter(causes.values()))
    ranks = _listed(map(str, causes))
    return f"rank{'s' * (len(causes) > 1)} {ranks}: {said}", where


def details(module: LightningModule, batch: Any) -> str:
    """Where a batch stands in the data, and the values in the layers; a few lines.

    The batch is run forward once more. Call on all ranks, or on none.

    Args:
        module: the module that trains.
        batch: its batch, on its device; None if it is gone.
    """
    lines = [f"batch: {position(module.trainer)}"]
    if batch is not None:
        try:
            outputs = _outputs(module, batch)
        except Exception as error:  # of a step that cannot be run twice; the stop is what matters
            lines.append(f"the batch could not be run again: {type(error).__name__}: {error}")
        else:
            first = _listed(not_finite_names(outputs)) or "none"
            lines.append(f"outputs not finite, in the order of the forward pass: {first}")
            lines.append(f"largest outputs: {by_layer(outputs)}")
    gradients = of_gradients(module)
    first = _listed(reversed(not_finite_names(gradients))) or "none"
    lines.append(f"gradients not finite, last layer first: {first}")
    lines.append(f"largest gradients: {by_layer(gradients)}")
    return "".join(f"\n  {line}" for line in lines)


def position(trainer: Trainer) -> str:
    """Where the current batch stands: what it takes to find it again.

    A data module tells in its `state_dict` where it is, in numbers.
    """
    data = getattr(trainer, "datamodule", None)
    state = data.state_dict() if data is not None else {}
    numbers = [f"{n} {v}" for n, v in state.items() if type(v) is int]
    told = f"epoch {trainer.current_epoch}, batch {trainer.fit_loop.batch_idx} of the epoch"
    if trainer.world_size > 1:
        told += f", rank {trainer.global_rank} of {trainer.world_size}"
    return told + (f"; data: {', '.join(numbers)}" if numbers else "")


def _outputs(module: LightningModule, batch: Any) -> Largest:
    """The largest outputs in a forward pass that leaves no trace, under the plan that is open."""
    trainer, open_here = module.trainer, interception.scope()
    given = (batch, trainer.fit_loop.batch_idx)
    wanted = len(inspect.signature(module.training_step).parameters)
    metrics = fresh_copies(metrics_of(module))
    with (
        undisturbed(trainer, module, metrics, lambda *_, **__: None),
        interception.opened(open_here.selections),
        torch.no_grad(),
        trainer.precision_plugin.train_step_context(),
        record_outputs(module) as largest,
    ):
        module.training_step(*given[:wanted])
    return largest


def _listed(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
