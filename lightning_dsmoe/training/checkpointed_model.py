"""Checkpoints that rebuild their model and run no code.

They hold the decoder's architecture and the text's tokenizer beside the weights, so that a decoder
can be made of one without the class that trained it.
"""

import sys
import warnings
from argparse import ArgumentError
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, Self

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.core.saving import CHECKPOINT_PAST_HPARAMS_KEYS
from lightning.pytorch.utilities import rank_zero_warn

from lightning_dsmoe.data.loader import unfinished_batches
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.finite import not_finite
from lightning_dsmoe.serialization.architecture import describe_decoder, differences
from lightning_dsmoe.serialization.checkpoint import (
    FORMAT_VERSION,
    check_embeddings,
    check_format,
    check_sharing,
    check_state,
    read_checkpoint,
)
from lightning_dsmoe.serialization.class_paths import check_hyperparameters
from lightning_dsmoe.training.checkpoint_io import SafeCheckpointIO
from lightning_dsmoe.training.random_state import (
    check_random_state,
    random_state,
    restore_random_state,
)
from lightning_dsmoe.training.restored_paths import drop_foreign_paths


class CheckpointedModel(LightningModule):
    """A LightningModule around a decoder, saved as plain data and resumed exactly."""

    decoder: Decoder
    _resumed_random_state: dict[str, Any] | None = None
    _batch_random_state: dict[str, Any] | None = None

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO[Any],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> Self:
        """Rebuild a model from a checkpoint file, importing nothing that the file names.

        Args:
            checkpoint_path: the file, or one that is open, at its beginning.
            map_location: device for the weights, or what else `torch.load` takes.
            hparams_file: YAML with the arguments of the model instead of those in the file.
            strict: as in Lightning; the names and shapes of the weights are always checked.
            weights_only: refuse files that hold more than data. False trusts the file fully.
            **kwargs: arguments of the model in place of those in the file; a model built in Python
                needs its factories here.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not a checkpoint of this class, is of another model, or names
                a class that is not known.
        """
        safe = weights_only is not False
        checkpoint = read_checkpoint(checkpoint_path, weights_only=safe)
        for key in (cls.CHECKPOINT_HYPER_PARAMS_KEY, *CHECKPOINT_PAST_HPARAMS_KEYS):
            check_hyperparameters(checkpoint.get(key, {}), cls)
            check_embeddings(checkpoint.get(key, {}), checkpoint["state_dict"])
        load = partial(
            super().load_from_checkpoint,
            checkpoint_path,
            hparams_file=hparams_file,
            strict=strict,
            weights_only=safe,
            **kwargs,
        )
        try:
            if safe and not kwargs and hparams_file is None:
                check_sharing(checkpoint["state_dict"])
                # All checks, before sizes in a file take memory; parts from elsewhere may need
                # some.
                with torch.device("meta"), suppress(RuntimeError):
                    load(map_location="meta")
                if not isinstance(checkpoint_path, str | Path):
                    checkpoint_path.seek(0)
            return load(map_location=map_location)
        except ArgumentError as error:  # of jsonargparse, which builds models of the command line
            reason = " ".join(str(error).split())
            raise ValueError(
                f"hyper-parameters that fit no {cls.__name__}: {reason:.500}"
            ) from None

    def setup(self, stage: str) -> None:
        """Let the Trainer write and load checkpoints safely, unless it was given another way."""
        self._resumed_random_state = self._batch_random_state = None  # of an earlier run
        trainer = self._trainer
        if trainer is not None and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SafeCheckpointIO()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to rebuild the decoder and to read its tokens without this class.

        Raises:
            FloatingPointError: if weights are not finite, so that they replace no good checkpoint.
        """
        self._check_weights()
        checkpoint["format_version"] = FORMAT_VERSION
        checkpoint["architecture"] = self._architecture()
        data = self._data()
        if hasattr(data, "tokenizer"):
            checkpoint["tokenizer"] = data.tokenizer.to_dict()
        for name, kind in (("context", int), ("val_fraction", float), ("test_fraction", float)):
            value = getattr(data, name, None)
            checkpoint[name] = kind(value) if isinstance(value, int | float) else None
        checkpoint["random_state"] = self._random_states()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another format, architecture or other weights, and drop paths of other runs."""
        check_format(checkpoint)
        if self._trainer is not None:
            drop_foreign_paths(checkpoint, self._trainer)
        before, now = checkpoint.get("architecture"), self._architecture()
        if before is not None and now is not None and (changes := differences(before, now)):
            raise ValueError(f"the checkpoint is of another model: {'; '.join(changes)}")
        if "state_dict" in checkpoint:  # strategies that shard have loaded and checked it
            check_state(self.state_dict(), checkpoint["state_dict"])
        if self._trainer is not None and self._trainer.state.fn == "fit":
            self._resumed_random_state = _of_rank(checkpoint, self._trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Continue the random numbers of the run that was resumed, once its loaders are running."""
        if self._resumed_random_state is not None:
            restore_random_state(self._resumed_random_state)
            self._resumed_random_state = None
        self._batch_random_state = random_state()

    def _random_states(self) -> list[dict[str, Any] | None] | None:
        """States of the random generators of each rank where training is to go on from here.

        None after an exception or in the middle of a batch on several ranks: others may not be
        saving, and waiting for them would lose the checkpoint.
        """
        trainer, unfinished = self._trainer, unfinished_batches(self._trainer)
        mine = self._batch_random_state if unfinished else random_state()
        if self._resumed_random_state is not None:
            mine = self._resumed_random_state
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return [mine]
        if unfinished or (trainer is not None and trainer.interrupted):
            return None
        states: list[dict[str, Any] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(states, mine)
        return states

    def _check_weights(self) -> None:
        floating = {n: p.detach() for n, p in self.named_parameters() if p.is_floating_point()}
        if not (names := not_finite(floating)):
            return
        before = sys.exception()  # that an interrupted run would save a checkpoint after
        raise FloatingPointError(
            f"{before}; " * (before is not None)
            + f"the weights are not finite ({names}), so no checkpoint was written"
        )

    def _architecture(self) -> dict[str, Any] | None:
        """Description of the decoder, None with a warning if it has none."""
        try:
            return describe_decoder(self.decoder)
        except ValueError as error:
            warnings.warn(
                f"checkpoints of this model do not hold its architecture: {error}", stacklevel=2
            )
            return None

    def _data(self) -> Any:
        """The data module in use, if there is one."""
        return getattr(self._trainer, "datamodule", None)

    def _keep_plain_hyperparameters(self) -> None:
        """Leave functions and objects given from Python out of checkpoints, which are data."""
        for name in [name for name, value in self.hparams.items() if not _is_plain(value)]:
            del self.hparams[name]


def _of_rank(checkpoint: Mapping[str, Any], trainer: Trainer) -> dict[str, Any] | None:
    """State of this rank's generators; None, with a warning, if as many ranks did not save them."""
    found = checkpoint.get("random_state", [None] * trainer.world_size)
    states = found if isinstance(found, list) else [found]  # a single one in older files
    for state in states:
        if state is not None:
            check_random_state(state)
    if len(states) != trainer.world_size or found is None:
        kept = 0 if found is None else len(states)
        rank_zero_warn(
            f"the checkpoint holds the random states of {kept} processes and this run has "
            f"{trainer.world_size}: random numbers, as of dropout, start anew from the seed"
        )
        return None
    mine: dict[str, Any] | None = states[trainer.global_rank]
    return mine


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)
