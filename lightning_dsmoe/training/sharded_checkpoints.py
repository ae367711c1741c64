"""Checkpoints of sharded models that are replaced whole, and checked before they are loaded."""

import os
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint import metadata as torch_index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.futures import Future
from torch.optim import Optimizer

from lightning_dsmoe.files import hidden_beside
from lightning_dsmoe.folders import put_in_place, remove
from lightning_dsmoe.serialization import sharded_folder
from lightning_dsmoe.serialization.archive import load_archive
from lightning_dsmoe.serialization.checkpoint import check_state, read_any
from lightning_dsmoe.serialization.sharded_index import Index
from lightning_dsmoe.training.checkpoint_io import sync_folder
from lightning_dsmoe.training.rank_zero import on_rank_zero

_FULL = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class SafeModelParallelStrategy(ModelParallelStrategy):
    """Lightning's strategy that shards, with checkpoints that are whole or absent, and data.

    Lightning 2.6.6 writes over the files of an earlier folder one by one, so that a run that is
    killed leaves a folder of two checkpoints, and unpickles the index of a folder and its values
    without a limit. It also takes the order of an optimizer's parameters for that of the model when
    it loads the file of one process, which mixes up the states of groups.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint beside its place and rename it; whatever fails, an earlier one stays.

        Args:
            checkpoint: what to save, which loses its weights and states of optimizers.
            filepath: the file or folder.
            storage_options: not supported, as in Lightning.

        Raises:
            TypeError: if there are options.
            OSError: if it cannot be written, for instance since the disk is full.
        """
        if storage_options is not None:
            raise TypeError("checkpoints of sharded models take no storage_options")
        # The same on all ranks, whose names of temporary files would differ.
        path = Path(filepath).expanduser()
        place, hidden = self.broadcast((path, hidden_beside(path)))
        sharded_folder.check_replaceable(place)
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if not self._save_distributed_checkpoint:
            on_rank_zero(trainer, partial(self.checkpoint_io.save_checkpoint, checkpoint, place))
            return
        states = {"state_dict": checkpoint.pop("state_dict")}
        for number, state in enumerate(checkpoint.pop("optimizer_states", [])):
            states[f"optimizer_{number}"] = state
        try:
            hidden.mkdir(parents=True, exist_ok=True)
            save = partial(save_shards, states, checkpoint_id=hidden)
            _failing_with(OSError, "no checkpoint was written", save)
            on_rank_zero(trainer, partial(_finish, checkpoint, hidden, place))
        except BaseException:
            remove(hidden)
            raise

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load weights and optimizers of a file or folder, however many processes wrote it.

        Args:
            checkpoint_path: the file or folder.
            weights_only: False trusts it fully; it can run any code then.

        Returns:
            All else that it holds.

        Raises:
            FileNotFoundError: if there is no such file or folder, or it is incomplete.
            ValueError: if it is damaged, of another model, or holds more than data.
        """
        path = Path(self.broadcast(checkpoint_path)).expanduser()
        safe = weights_only is not False
        assert self.model is not None
        load = _load_folder if path.is_dir() else _load_file
        return load(path, self.model, self.optimizers, weights_only=safe)


def _finish(checkpoint: dict[str, Any], hidden: Path, place: Path) -> None:
    """Complete a folder of shards, and put it into its place if all of them are in it."""
    with (hidden / sharded_folder.META).open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    try:
        sharded_folder.read_index(hidden)
    except ValueError as error:  # such as shards of another machine, on a disk of its own
        raise OSError(
            f"no checkpoint was written: {error}; all machines have to see {place.parent}"
        ) from None
    sync_folder(hidden)
    put_in_place(hidden, place)
    sync_folder(place.parent)


def _load_file(
    path: Path, model: nn.Module, optimizers: list[Optimizer], *, weights_only: bool
) -> dict[str, Any]:
    checkpoint = read_any(path, weights_only=weights_only)
    weights = checkpoint.pop("state_dict")
    check_state(model.state_dict(), weights)
    set_model_state_dict(model, weights, options=_FULL)
    for optimizer, state in _pairs(optimizers, checkpoint.get("optimizer_states"), path):
        named = _named(state, optimizer, model)
        set_optimizer_state_dict(model, optimizer, named, options=_FULL)
    return checkpoint


def _load_folder(
    path: Path, model: nn.Module, optimizers: list[Optimizer], *, weights_only: bool
) -> dict[str, Any]:
    try:
        index = sharded_folder.read_index(path)
        meta = sharded_folder.read_meta(path, weights_only=weights_only)
    except (ValueError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged or holds more than data: {reason}") from None
    weights: dict[str, Any] = get_model_state_dict(model)
    saved = {
        str(entry.path[1]): entry.on_meta()
        for entry in index.values()
        if entry.path[0] == "state_dict" and entry.dtype is not None
    }
    check_state(weights, saved)

    def load(name: str, state: dict[str, Any]) -> dict[str, Any]:
        content = {name: state}
        options = {"storage_reader": _Reader(path, index), "planner": _Planner(weights_only)}
        _failing_with(
            ValueError, f"{path} cannot be loaded", partial(load_shards, content, **options)
        )
        return content[name]

    set_model_state_dict(model, load("state_dict", weights))
    names = [f"optimizer_{number}" for number in range(len(optimizers))]
    known = [name for name in names if any(entry.path[0] == name for entry in index.values())]
    for optimizer, name in _pairs(optimizers, known, path):
        state = load(name, get_optimizer_state_dict(model, optimizer))
        set_optimizer_state_dict(model, optimizer, state)
    return meta


def _pairs(optimizers: list[Optimizer], states: Any, path: Path) -> list[tuple[Optimizer, Any]]:
    if not optimizers:
        return []
    if not isinstance(states, list) or len(states) != len(optimizers):
        raise ValueError(f"{path} does not hold the state of an optimizer, so no run can resume")
    return list(zip(optimizers, states, strict=True))


def _named(state: Mapping[str, Any], optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """The state of an optimizer with names of parameters for the numbers that one process saves.

    Numbers are matched by their places in the groups, as `Optimizer.load_state_dict` does.
    """
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    names = [[name_of[each] for each in group["params"]] for group in optimizer.param_groups]
    groups = state["param_groups"]
    if [len(group["params"]) for group in groups] != [len(each) for each in names]:
        raise ValueError("the checkpoint's optimizer has other groups of parameters")
    numbers = chain.from_iterable(group["params"] for group in groups)
    name = dict(zip(numbers, chain.from_iterable(names), strict=True))
    return {
        "state": {name[number]: each for number, each in state["state"].items()},
        "param_groups": [
            {**group, "params": each} for group, each in zip(groups, names, strict=True)
        ],
    }


class _Reader(FileSystemReader):
    """Reads the shards of an index that was checked, each only if it is a whole archive."""

    def __init__(self, folder: Path, index: Index) -> None:
        super().__init__(folder)
        self.folder, self.index = folder, index

    def read_metadata(self, *args: Any, **kwargs: Any) -> torch_index.Metadata:
        content: dict[str, Any] = {}
        places = {}
        for name, entry in self.index.items():
            is_tensor = entry.dtype is not None
            for shard in entry.shards:
                offsets = torch.Size(shard.offsets) if is_tensor else None
                places[torch_index.MetadataIndex(name, offsets)] = shard.place
            if entry.dtype is None:
                content[name] = torch_index.BytesStorageMetadata()
                continue
            content[name] = torch_index.TensorStorageMetadata(
                torch_index.TensorProperties(entry.dtype),
                torch.Size(entry.size),
                [
                    torch_index.ChunkStorageMetadata(torch.Size(s.offsets), torch.Size(s.sizes))
                    for s in entry.shards
                ],
            )
        return torch_index.Metadata(content, storage_data=places)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            sharded_folder.read_shard(self.folder, self.storage_data[item.storage_index])
        done: Future[None] = super().read_data(plan, planner)
        return done


class _Planner(DefaultLoadPlanner):
    """Refuses values that are more than data, unless they are trusted."""

    def __init__(self, weights_only: bool) -> None:
        super().__init__()
        self.weights_only = weights_only

    def load_bytes(self, read_item: Any, value: Any) -> None:
        if self.weights_only:
            load_archive(value, weights_only=True)  # raises for what torch would run next
            value.seek(0)
        super().load_bytes(read_item, value)


def _failing_with(kind: type[Exception], message: str, work: Callable[[], Any]) -> None:
    """Do what raises torch's exception of several tracebacks, and raise the first as one line."""
    try:
        work()
    except CheckpointException as failed:
        error = next(iter(failed.failures.values()))[0]
        reason = " ".join(str(error).partition("\n")[0].split()) or type(error).__name__
        raise kind(f"{message}: {reason:.300}") from None
