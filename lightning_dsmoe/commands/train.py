"""The training commands: LightningCLI."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.utilities.exceptions import SIGTERMException

# Every part that a configuration may name by its class name alone has to be imported here.
import lightning_dsmoe.attention
import lightning_dsmoe.callbacks
import lightning_dsmoe.data.text
import lightning_dsmoe.experts
import lightning_dsmoe.routing
import lightning_dsmoe.schedules
import lightning_dsmoe.training.language_model
import lightning_dsmoe.training.upcycled_language_model  # noqa: F401
from lightning_dsmoe.commands.errors import OneLineErrors, one_line
from lightning_dsmoe.commands.overview import COMMON_OPTIONS
from lightning_dsmoe.commands.tools import Help
from lightning_dsmoe.serialization.checkpoint import read_checkpoint
from lightning_dsmoe.serialization.sharded_folder import read_index
from lightning_dsmoe.training.console import with_console_callbacks
from lightning_dsmoe.training.end_together import LAUNCHER, EndTogether, is_follow_up, plainly
from lightning_dsmoe.training.kept_rows import keep_rows
from lightning_dsmoe.training.last_checkpoint import find_last_checkpoint, written_checkpoint
from lightning_dsmoe.training.run_folder import run_folder

_CHECKPOINT_WORDS = {"best", "last", "hpc"}
"""Values of `--ckpt_path` that are not paths."""
_PROCESSES_PER_CORE = 4
_SIGTERM_EXIT_CODE = 143


class TrainingParser(OneLineErrors, LightningArgumentParser):
    """Parser of the training commands."""


class SaveRunConfig(SaveConfigCallback):
    """Saves the configuration in the folder of the run, where checkpoints and results are.

    Lightning's own callback writes to `trainer.log_dir`, which most loggers share between runs.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        run_folder(trainer)  # on all ranks
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if (folder := run_folder(trainer)) is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(
                self.config,
                folder / self.config_filename,
                skip_unset=False,
                overwrite=self.overwrite,
                multifile=self.multifile,
            )


class DSMoECLI(LightningCLI):
    """LightningCLI that links the vocabulary size and vets checkpoints before anything is built."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # Whose options a `model` without a class_path has.
        parser.set_defaults({"model": {"class_path": "lightning_dsmoe.DSMoELanguageModel"}})
        parser.link_arguments(
            "data", "model.init_args.vocab_size", compute_fn=_vocab_size, apply_on="instantiate"
        )

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let a checkpoint's arguments override the command line's."""

    def before_instantiate_classes(self) -> None:
        """Read checkpoints as data only, and check one before minutes go into building a model."""
        options = self.config[self.subcommand]
        options.weights_only = options.weights_only is not False
        _check_processes(options.trainer)
        look_into(options.ckpt_path, weights_only=options.weights_only)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        self.together = EndTogether()
        return super()._instantiate_trainer(
            with_console_callbacks(config), [*callbacks, self.together]
        )

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Resolve `--ckpt_path last`, for which Lightning looks in this run's new folder only."""
        options = super()._prepare_subcommand_kwargs(subcommand)
        if options.get("ckpt_path") == "last":
            options["ckpt_path"] = find_last_checkpoint(self.trainer)
            look_into(options["ckpt_path"], weights_only=options["weights_only"])
        if subcommand == "fit" and options.get("ckpt_path"):
            keep_rows(self.trainer)
        return options

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.words = [*args] if isinstance(args, list) else sys.argv[1:]
        super().parse_arguments(parser, args)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a command; one that is stopped says how to go on from its last checkpoint."""
        os.environ.setdefault(LAUNCHER, str(os.getpid()))
        try:
            super()._run_subcommand(subcommand)
        except SIGTERMException:
            if subcommand == "fit" and self.trainer.is_global_zero:
                print(f"lightning-dsmoe: stopped; {self._to_go_on()}", file=sys.stderr)
            sys.exit(_SIGTERM_EXIT_CODE)
        except SystemExit as end:
            stop = end.__context__  # Lightning ends a run after Ctrl-C itself, with code 1
            if not isinstance(stop, KeyboardInterrupt):
                raise
            if subcommand == "fit":
                stop.add_note(self._to_go_on())
            raise stop from None
        except Exception as last:
            first = self.together.error
            error = first if isinstance(first, Exception) else last
            if is_follow_up(error):
                sys.exit(1)
            if error is not last and str(error) and str(error) in str(last):
                error = last  # which says both
            if error is not last:  # such as of a full disk, when the run was to be saved at its end
                reason = one_line(plainly(str(last)))
                print(f"lightning-dsmoe: warning: while the run ended: {reason}", file=sys.stderr)
            error.args = tuple(plainly(arg) if isinstance(arg, str) else arg for arg in error.args)
            raise error from error.__cause__

    def _to_go_on(self) -> str:
        """The command that resumes this run."""
        if (path := written_checkpoint(self.trainer)) is None:
            return "no checkpoint was written"
        words = [word for word in self.words if not word.startswith("--ckpt_path=")]
        return f"to go on: {shlex.join(['lightning-dsmoe', *words, f'--ckpt_path={path}'])}"


def look_into(path: str | None, *, weights_only: bool) -> None:
    """Raise a ValueError if the checkpoint to resume from holds code or is none."""
    if not path or path in _CHECKPOINT_WORDS:
        return
    if Path(path).is_dir():
        read_index(Path(path))
    elif Path(path).is_file():
        # Without checksums: the Trainer, which reads the whole file anyway, compares them.
        read_checkpoint(path, weights_only=weights_only, checksums=False)


def _check_processes(trainer: Any) -> None:
    """Raise a ValueError for far more processes than CPU cores: they would fill the memory."""
    devices, cores = str(trainer.devices), os.cpu_count() or 1
    on_cpu = trainer.accelerator == "cpu" or (
        trainer.accelerator == "auto" and not torch.accelerator.is_available()
    )
    if on_cpu and devices.isdecimal() and int(devices) > _PROCESSES_PER_CORE * cores:
        raise ValueError(
            f"trainer.devices={devices} starts {devices} processes on {cores} CPU cores; up to "
            f"{_PROCESSES_PER_CORE * cores} are allowed here, and more than {cores} are no faster"
        )


def _vocab_size(data: Any) -> int:
    """The vocabulary of any data module that has one."""
    size: int = data.vocab_size
    return size


def cli_main(args: ArgsType = None) -> LightningCLI:
    """Build and run the training command line.

    Args:
        args: arguments instead of those of the process, for instance `["fit", "-c", "my.yaml"]`.
    """
    return DSMoECLI(
        LightningModule,
        LightningDataModule,
        parser_class=TrainingParser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=1234,
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
        auto_configure_optimizers=False,
        parser_kwargs={
            "prog": "lightning-dsmoe",
            "description": (
                "Train DS-MoE language models: all experts are trained on every token;\n"
                "at inference only those that matter run."
            ),
            "epilog": COMMON_OPTIONS,
            "formatter_class": Help,
        },
        args=args,
    )
