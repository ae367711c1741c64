"""A further run of a step that leaves no trace in its module, its trainer and random numbers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_dsmoe.routing import interception

Metrics = Mapping[str, nn.Module]
"""The torchmetrics of a module by name, each collection as one."""


def metrics_of(module: nn.Module) -> dict[str, nn.Module]:
    """The outermost torchmetrics in a module; one in several places has all their names."""
    found = {
        name: each
        for name, each in module.named_modules(remove_duplicate=False)
        if isinstance(each, Metric | MetricCollection)
    }
    inside = tuple(f"{name}." for name in found)
    return {name: each for name, each in found.items() if not name.startswith(inside)}


def fresh_copies(metrics: Metrics) -> dict[str, nn.Module]:
    """Copies of metrics that begin anew."""
    copies: dict[str, Any] = deepcopy(dict(metrics))
    for metric in copies.values():
        metric.reset()
    return copies


@contextmanager
def undisturbed(
    trainer: Trainer, pl_module: LightningModule, metrics: Metrics, log: Callable[..., None]
) -> Iterator[None]:
    """Let a step of a module run once more, without the other runs noticing.

    Random numbers, loggers, the module's torchmetrics, its attributes and all buffers are as before
    afterwards, with the tensors, lists, dicts and sets in attributes. What other objects hold, and
    attributes of its children, are not protected.

    Args:
        trainer: whose loggers are told nothing.
        pl_module: the module.
        metrics: what takes the place of its torchmetrics.
        log: what takes the place of its `log`.
    """
    own, loggers, attributes = metrics_of(pl_module), trainer.loggers, dict(vars(pl_module))
    copies = {n: _copied(value) for n, value in attributes.items() if not n.startswith("_")}
    buffers = {buffer: buffer.clone() for buffer in pl_module.buffers()}
    with isolate_rng(pl_module.device.type == "cuda"), interception.set_aside():
        try:
            trainer.loggers = [DummyLogger() for _ in loggers]
            vars(pl_module).update(copies, log=log)
            _put(pl_module, metrics)
            yield
        finally:
            _put(pl_module, own)
            vars(pl_module).clear()
            vars(pl_module).update(attributes)
            for buffer, before in buffers.items():
                buffer.copy_(before)
            trainer.loggers = loggers


def _copied(value: Any) -> Any:
    """Containers and tensors in memory of their own; other objects as they are."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        own = copy(value)  # of its own class, such as a defaultdict
        own.update({name: _copied(each) for name, each in value.items()})
        return own
    if type(value) in (list, tuple, set):
        return type(value)(map(_copied, value))
    return copy(value) if isinstance(value, list | set) else value


def _put(module: nn.Module, children: Metrics) -> None:
    for name, child in children.items():
        module.set_submodule(name, child)
