"""The tools for trained models by name, and what the help says of them."""

import argparse
import keyword
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from textwrap import fill

import jsonargparse

COMMON_OPTIONS = """\
options of every command:
  --import MODULE       Import your own routers, experts or other classes first;
                        may be repeated.
  --debug               Show the traceback of an error."""


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
        "compile",
        "prune",
        "certify",
        "report",
        "consolidate",
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


class Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the text below the options."""


def tools_in_words() -> str:
    """Each tool with the first line of its docstring, as argparse lists subcommands."""
    words = {name: (tool.__doc__ or "").partition("\n")[0] for name, tool in TOOLS.items()}
    indent = " " * 24
    return "\n".join(
        fill(text, 79, initial_indent=f"    {name:20}", subsequent_indent=indent)
        for name, text in words.items()
    )
