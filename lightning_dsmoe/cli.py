"""The command line: LightningCLI for training, and the tools for trained models."""

import argparse
import keyword
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from textwrap import fill
from typing import Any, NoReturn

import jsonargparse
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
import lightning_dsmoe.data
import lightning_dsmoe.experts
import lightning_dsmoe.routing
import lightning_dsmoe.schedules
import lightning_dsmoe.training.language_model
import lightning_dsmoe.training.upcycled_language_model  # noqa: F401
from lightning_dsmoe.commands.console import console_output
from lightning_dsmoe.commands.errors import DEBUG, OneLineErrors, fail, mistake_of, one_line
from lightning_dsmoe.serialization.checkpoint import read_checkpoint
from lightning_dsmoe.training.console import with_console_callbacks
from lightning_dsmoe.training.last_checkpoint import find_last_checkpoint
from lightning_dsmoe.training.run_folder import run_folder


class _Tools(Mapping[str, Callable[..., None]]):
    """The function of each tool by its name, imported when it is looked up."""

    names = (
        "upcycle",
        "import",
        "export",
        "evaluate",
        "generate",
        "sweep",
        "calibrate",
        "prune",
        "certify",
        "report",
        "configs",
    )

    def __getitem__(self, name: str) -> Callable[..., None]:
        if name not in self.names:
            raise KeyError(name)
        name = _named(name)
        module = import_module(f"lightning_dsmoe.commands.{name}")
        tool: Callable[..., None] = getattr(module, name)
        return tool

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _named(name: str) -> str:
    """A name as Python has it: `from` and `import` are keywords there."""
    return f"{name}_" if keyword.iskeyword(name) else name


TOOLS = _Tools()
_IMPORTS = "LIGHTNING_DSMOE_IMPORTS"  # read by the processes that a distributed strategy starts
_COMMON_OPTIONS = """\
options of every command:
  --import MODULE       Import your own routers, experts or other classes first;
                        may be repeated.
  --debug               Show the traceback of an error."""
_SIGTERM_EXIT_CODE = 143
_CHECKPOINT_WORDS = {"best", "last", "hpc"}
"""Values of `--ckpt_path` that are not paths."""
_PROCESSES_PER_CORE = 4


class _Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the text below the options."""


class ToolParser(OneLineErrors):
    """Parser of a tool, whose option `--from` sets the argument `from_`."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        plain = [word.rstrip("_") if word.startswith("--") else word for word in args]
        for word, as_given in zip(plain, args, strict=True):
            if word != as_given:
                kwargs.setdefault("dest", as_given.lstrip("-"))
        return super().add_argument(*plain, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(re.sub(r"\bfrom_(?=[,:]|$)", "from", message), ex)


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
        _look_into(options.ckpt_path, weights_only=options.weights_only)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        return super()._instantiate_trainer(with_console_callbacks(config), callbacks)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Resolve `--ckpt_path last`, for which Lightning looks in this run's new folder only."""
        options = super()._prepare_subcommand_kwargs(subcommand)
        if options.get("ckpt_path") == "last":
            options["ckpt_path"] = find_last_checkpoint(self.trainer)
            _look_into(options["ckpt_path"], weights_only=options["weights_only"])
        return options


def _look_into(path: str | None, *, weights_only: bool) -> None:
    """Raise a ValueError if the checkpoint to resume from holds code or is none."""
    if not path or path in _CHECKPOINT_WORDS:
        return
    if weights_only and Path(path).is_dir():
        raise ValueError(
            f"{path} is the folder of a sharded checkpoint, which can run code when it is read; "
            "--weights_only false loads one that you trust"
        )
    if Path(path).is_file():
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
            "epilog": f"tools for trained models:\n{_tools_in_words()}\n\n{_COMMON_OPTIONS}",
            "formatter_class": _Help,
        },
        args=args,
    )


def main(args: Sequence[str] | None = None) -> None:
    """Run `lightning-dsmoe`; a mistake ends it with one line and exit code 1 or 2."""
    if args is not None:
        sys.argv[1:] = args
    if "--debug" in sys.argv:
        os.environ[DEBUG] = "true"
    words = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        with console_output():
            modules = _import_modules(words)
            sys.argv[1:] = words
            _run(words, modules)
    except SIGTERMException:
        sys.exit(_SIGTERM_EXIT_CODE)
    except Exception as error:
        if DEBUG in os.environ:
            raise
        mistake = mistake_of(error)
        fail(one_line(str(mistake)) or type(mistake).__name__, code=1)


def _run(words: list[str], modules: list[str]) -> None:
    commands = [*DSMoECLI.subcommands(), *TOOLS]
    if words and not words[0].startswith("-") and words[0] not in commands:
        fail(f"no command {words[0]!r}; there are {', '.join(commands)}", code=2)
    if words and words[0] in TOOLS:
        tool = words.pop(0)
        jsonargparse.auto_cli(
            TOOLS[tool],
            args=[_underscored(word) for word in words],
            as_positional=False,
            prog=f"lightning-dsmoe {tool}",
            epilog=_COMMON_OPTIONS,
            formatter_class=_Help,
            parser_class=ToolParser,
        )
    else:
        os.environ[_IMPORTS] = ",".join(modules)  # for the processes that a strategy starts
        with _current_folder_searched():
            cli_main()


def _tools_in_words() -> str:
    """Each tool with the first line of its docstring, as argparse lists subcommands."""
    words = {name: (tool.__doc__ or "").partition("\n")[0] for name, tool in TOOLS.items()}
    indent = " " * 24
    return "\n".join(
        fill(text, 79, initial_indent=f"    {name:20}", subsequent_indent=indent)
        for name, text in words.items()
    )


@contextmanager
def _current_folder_searched() -> Iterator[None]:
    """Let modules in the current folder be found, as by `python -m`.

    Only while a configuration or `--import` may name some. A tool that is called in a folder with
    somebody else's model must not import a file there because PyTorch tries an optional package.
    """
    path = list(sys.path)
    if "" not in path:
        sys.path.append("")
    try:
        yield
    finally:
        if "" not in path:
            sys.path.remove("")


def _import_modules(words: list[str]) -> list[str]:
    """Remove every `--import MODULE` from the words, and import the modules.

    Returns:
        Names of the modules, those for a parent process's sake too.
    """
    names = [name for name in os.environ.get(_IMPORTS, "").split(",") if name]
    rest, each = [], iter(words)
    for word in each:
        option, is_given, name = word.partition("=")
        if option == "--import":
            names.append(name if is_given else next(each, ""))
        else:
            rest.append(word)
    words[:] = rest
    for name in names:
        if not all(map(str.isidentifier, name.split("."))) or name.endswith(".py"):
            raise ValueError(f"--import takes the name of a module, such as my_parts, got {name!r}")
        try:
            with _current_folder_searched():
                import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise ValueError(
                f"--import {name}: there is no module {error.name!r} in this folder or where "
                "Python looks for modules"
            ) from None
    return list(dict.fromkeys(names))


def _underscored(word: str) -> str:
    """`--max_loss_increase=1%` for `--max-loss-increase=1%`; other words stay as they are."""
    option = re.match("--[a-z]+(-[a-z]+)+(?=$|=)", word)
    return word if option is None else "--" + option[0][2:].replace("-", "_") + word[option.end() :]


if __name__ == "__main__":
    main()
