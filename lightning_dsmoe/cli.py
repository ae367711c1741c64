"""The command line: LightningCLI for training, and the tools for trained models."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

import jsonargparse

from lightning_dsmoe.commands.console import console_output, stop_quietly
from lightning_dsmoe.commands.errors import DEBUG, OneLineErrors, fail, in_one_line
from lightning_dsmoe.commands.overview import COMMON_OPTIONS, TRAINING, overview
from lightning_dsmoe.commands.tools import TOOLS, Help
from lightning_dsmoe.commands.vulnerable import warn_of_vulnerable_packages
from lightning_dsmoe.imports import imported_on_use

if TYPE_CHECKING:
    from lightning_dsmoe.commands.train import DSMoECLI as DSMoECLI
    from lightning_dsmoe.commands.train import TrainingParser as TrainingParser
    from lightning_dsmoe.commands.train import cli_main as cli_main

_IMPORTS = "LIGHTNING_DSMOE_IMPORTS"  # read by the processes that a distributed strategy starts

# Imported when first used: a tool starts without Lightning, which takes seconds.
__getattr__ = imported_on_use(
    __name__,
    DSMoECLI="commands.train",
    TrainingParser="commands.train",
    cli_main="commands.train",
)


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


def main(args: Sequence[str] | None = None) -> None:
    """Run `lightning-dsmoe`; a mistake ends it with one line and exit code 1 or 2."""
    if args is not None:
        sys.argv[1:] = args
    if "--debug" in sys.argv:
        os.environ[DEBUG] = "true"
    words = [word for word in sys.argv[1:] if word != "--debug"]
    try:
        with console_output():
            warn_of_vulnerable_packages()
            modules = _import_modules(words)
            sys.argv[1:] = words
            _run(words, modules)
    except KeyboardInterrupt as stop:
        if DEBUG in os.environ:
            raise
        stop_quietly(stop)
    except Exception as error:
        if DEBUG in os.environ:
            raise
        fail(in_one_line(error), code=1)


def _run(words: list[str], modules: list[str]) -> None:
    if words in (["-h"], ["--help"]):
        print(overview())
        return
    commands = [*TRAINING, *TOOLS]
    if not words:
        fail(f"a command is missing: {', '.join(commands)}; --help describes them", code=2)
    if not words[0].startswith("-") and words[0] not in commands:
        fail(f"no command {words[0]!r}; there are {', '.join(commands)}", code=2)
    if words in [[command] for command in TRAINING]:
        fail(
            f"{words[0]} needs a configuration: {words[0]} -c FILE.yaml; the command configs lists "
            "those that come with this library",
            code=2,
        )
    if words[0] in TOOLS:
        tool = words.pop(0)
        jsonargparse.auto_cli(
            TOOLS[tool],
            args=[_underscored(word) for word in words],
            as_positional=False,
            prog=f"lightning-dsmoe {tool}",
            epilog=COMMON_OPTIONS,
            formatter_class=Help,
            parser_class=ToolParser,
        )
    else:
        os.environ[_IMPORTS] = ",".join(modules)  # for the processes that a strategy starts
        with _current_folder_searched():
            import_module("lightning_dsmoe.commands.train").cli_main()


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
