"""Checkpoints that rebuild their model and run no code.

They hold the decoder's architecture and the data's tokenizer beside the weights, so that a decoder
can be built from one without the class that trained it.
"""

import inspect
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.core.saving import CHECKPOINT_PAST_HPARAMS_KEYS
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lightning_dsmoe.finite import not_finite
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.serialization import checkpoint as checkpoint_file
from lightning_dsmoe.serialization.architecture import (
    build_decoder,
    describe_decoder,
    differences,
    part_factory,
)
from lightning_dsmoe.serialization.class_paths import PARTS_OF_LAYERS, check_hyperparameters
from lightning_dsmoe.training.checkpoint_io import SafeCheckpointIO
from lightning_dsmoe.training.restored_paths import drop_foreign_paths
from lightning_dsmoe.training.sharded_checkpoints import SafeModelParallelStrategy

Model = TypeVar("Model", bound=LightningModule)
_DATA_ATTRIBUTES = (("context", int), ("val_fraction", float), ("test_fraction", float))


def load_checked(
    cls: type[Model],
    load: Callable[..., Model],
    path: str | Path | IO[Any],
    /,
    *,
    map_location: Any,
    weights_only: bool,
    **options: Any,
) -> Model:
    """Load a model after checking its file: nothing that the file names is imported.

    Args:
        cls: the class of the model.
        load: Lightning's `load_from_checkpoint` of this class.
        path: the file, or one that is open, at its beginning.
        map_location: device for the weights.
        weights_only: refuse a file that holds more than data.
        **options: further arguments of `load`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is invalid or does not match the class.
    """
    checkpoint = checkpoint_file.read_checkpoint(path, weights_only=weights_only)
    for key in (cls.CHECKPOINT_HYPER_PARAMS_KEY, *CHECKPOINT_PAST_HPARAMS_KEYS):
        check_hyperparameters(checkpoint.get(key, {}), cls)
        checkpoint_file.check_embeddings(checkpoint.get(key, {}), checkpoint["state_dict"])
    described: dict[str, Any] = {}
    if options.get("hparams_file") is None:
        described = _given_in_python(cls, checkpoint)
        _check_arguments(cls, checkpoint, {**described, **options})
    _check_device(map_location)
    load = partial(load, path, weights_only=weights_only, **{**described, **options})
    is_untrusted = weights_only and options.keys() <= {"hparams_file", "strict"}
    try:
        if is_untrusted and options.get("hparams_file") is None:
            checkpoint_file.check_sharing(checkpoint["state_dict"])
            # A file of a few kilobytes can name sizes of many gigabytes. So the model is built on
            # the meta device first, which allocates nothing and runs the same checks of shapes. A
            # user's router or norm may read its values in its constructor, which fails there.
            with torch.device("meta"), suppress(RuntimeError):
                load(map_location="meta")
            if not isinstance(path, str | Path):
                path.seek(0)
        return load(map_location=map_location)
    except ArgumentError as error:  # of jsonargparse, which builds models of the command line
        reason = " ".join(str(error).split())
        raise ValueError(f"hyper-parameters that fit no {cls.__name__}: {reason:.500}") from None
    except (ValueError, OSError, MemoryError, ImportError):
        raise
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # whatever Lightning and PyTorch make of a file that is not theirs
        if not is_untrusted:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"no {cls.__name__} can be built from {path}: {reason:.500}") from error


def _given_in_python(cls: type[LightningModule], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a model that was built in Python, whose objects are no hyper-parameters.

    Its layers and norms are those of the described architecture, its selections those of the plan
    that it was trained with.
    """
    kept = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY) or {}
    if "_instantiator" in kept:  # of the command line, which keeps all of them
        return {}
    arguments: dict[str, Any] = {}
    if (architecture := checkpoint.get("architecture")) is not None:
        build_decoder(architecture)  # raises if it is none
        for name in (*PARTS_OF_LAYERS, "norm"):
            part = architecture[name]
            arguments[name] = (
                [part_factory(of_layer, name) for of_layer in part]
                if isinstance(part, list)
                else part_factory(part, name)
            )
    if (plan := checkpoint.get("training_plan")) is not None:
        selections = SelectionPlan.from_dict(plan)
        arguments["expert_selection"] = selections.experts
        arguments["attention_selection"] = selections.attention
    taken = inspect.signature(cls).parameters.keys() - kept.keys()
    return {name: value for name, value in arguments.items() if name in taken}


def _check_device(map_location: Any) -> None:
    """Raise a RuntimeError if a device is not there, which is no fault of the file."""
    if not isinstance(map_location, str | torch.device):
        return
    try:
        torch.empty(0, device=map_location)
    except (RuntimeError, AssertionError) as error:
        raise RuntimeError(f"map_location={str(map_location)!r}: {error}") from None


def _check_arguments(
    cls: type[LightningModule], checkpoint: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    """Refuse a file that lacks arguments of the model, as one without hyper-parameters does."""
    parameters = inspect.signature(cls).parameters
    kept = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY)
    names = set(given)
    if kept is not None:
        for key in (cls.CHECKPOINT_HYPER_PARAMS_KEY, *CHECKPOINT_PAST_HPARAMS_KEYS):
            names |= checkpoint.get(key, {}).keys()
    if "_instantiator" in names:  # jsonargparse says what is missing
        return
    # Lightning passes all of them as one argument if they were saved as one object.
    names |= {
        name for name in parameters if name == checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_NAME)
    }
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if missing := [name for name in required if name not in names]:
        raise ValueError(
            f"the checkpoint does not say {', '.join(missing)} of {cls.__name__}: pass "
            "them to load_from_checkpoint"
        )


def use_safe_checkpoint_io(trainer: Trainer | None) -> None:
    """Let a Trainer write and load checkpoints safely, unless it has a plugin of its own for it."""
    if trainer is None:
        return
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = SafeCheckpointIO()
    if type(trainer.strategy) is ModelParallelStrategy:  # which takes no plugin for this
        trainer.strategy.__class__ = SafeModelParallelStrategy


def add_content(checkpoint: dict[str, Any], model: nn.Module, data: Any) -> None:
    """Add what is needed to rebuild the decoder and to read its tokens without its class.

    Args:
        checkpoint: what Lightning saves.
        model: the model; of one without a `decoder` there is no architecture to add.
        data: the data module in use, or None.

    Raises:
        FloatingPointError: if weights are not finite, so that they replace no good checkpoint.
    """
    _check_weights(model)
    checkpoint["format_version"] = checkpoint_file.FORMAT_VERSION
    checkpoint["architecture"] = _architecture(model)
    if isinstance(plan := getattr(model, "plan", None), SelectionPlan):
        with suppress(TypeError):  # a selection of somebody's own need not be a dataclass
            checkpoint["training_plan"] = plan.to_dict()
    if hasattr(data, "tokenizer"):
        checkpoint["tokenizer"] = data.tokenizer.to_dict()
    for name, kind in _DATA_ATTRIBUTES:
        value = getattr(data, name, None)
        checkpoint[name] = kind(value) if isinstance(value, int | float) else None


def check_content(checkpoint: dict[str, Any], model: nn.Module, trainer: Trainer | None) -> None:
    """Refuse a checkpoint of another format or model, and drop its paths of other runs.

    Args:
        checkpoint: what was loaded; the states of its callbacks are changed.
        model: the model that is to take its weights.
        trainer: the Trainer that resumes from it, if any.

    Raises:
        ValueError: if the format, the architecture, or a name or shape of a weight differs.
    """
    checkpoint_file.check_format(checkpoint)
    if trainer is not None:
        drop_foreign_paths(checkpoint, trainer)
    before, now = checkpoint.get("architecture"), _architecture(model)
    if before is not None and now is not None and (changes := differences(before, now)):
        raise ValueError(f"the checkpoint is of another model: {'; '.join(changes)}")
    if "state_dict" in checkpoint:  # strategies that shard have loaded and checked it
        checkpoint_file.check_state(model.state_dict(), checkpoint["state_dict"])


def drop_objects(hyperparameters: MutableMapping[str, Any]) -> None:
    """Leave functions and objects given from Python out of checkpoints, which are data."""
    for name in [name for name, value in hyperparameters.items() if not _is_plain(value)]:
        del hyperparameters[name]


def _check_weights(model: nn.Module) -> None:
    floating = {n: p.detach() for n, p in model.named_parameters() if p.is_floating_point()}
    if not (names := not_finite(floating)):
        return
    before = sys.exception()  # after which an interrupted run saves a checkpoint
    raise FloatingPointError(
        f"{before}; " * (before is not None)
        + f"the weights are not finite ({names}), so no checkpoint was written"
    )


def _architecture(model: Any) -> Mapping[str, Any] | None:
    """Description of the decoder; None without one, or with a warning if it has no description."""
    if not hasattr(model, "decoder"):
        return None
    try:
        return describe_decoder(model.decoder)
    except ValueError as error:
        warnings.warn(
            f"checkpoints of this model do not hold its architecture: {error}", stacklevel=2
        )
        return None


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)
