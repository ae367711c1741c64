"""The tools for trained models by name, and the format of their help."""

import argparse
import keyword
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module

import jsonargparse


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
