"""The tools for trained models by name, and the format of their help."""

import argparse
import keyword
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module

import jsonargparse

SENTENCES = {
    "upcycle": "Turn the feed-forward layers of a transformers model into mixtures of experts.",
    "import": "Write a checkpoint of a model of transformers, which gives the same logits.",
    "export": "Write a model as a directory that transformers reads, with the same logits.",
    "evaluate": "Measure a model on tasks of lm-evaluation-harness or on a text, also under plans.",
    "generate": "Generate text from a checkpoint or a sparse model.",
    "sweep": "Measure loss and active share under some forty plans, from very sparse to dense.",
    "calibrate": "Search for a plan: which experts to run in each layer for the lowest loss.",
    "compile": "Write a checkpoint as a sparse model, which runs the experts of a plan only.",
    "prune": "Write a sparse model without the experts that its plan never runs on held-out text.",
    "certify": "Certify what a sparse model loses against all experts, or check its certificate.",
    "report": "Write an HTML page on how a trained model uses its experts.",
    "consolidate": "Write one checkpoint file from the folder that a sharded run saved.",
    "configs": "List the shipped configurations, or print one.",
}
"""What each does, the first line of its help, for which its function is not imported."""


class _Tools(Mapping[str, Callable[..., None]]):
    """The function of each tool by its name, imported when it is looked up."""

    def __getitem__(self, name: str) -> Callable[..., None]:
        if name not in SENTENCES:
            raise KeyError(name)
        name = _named(name)
        module = import_module(f"lightning_dsmoe.commands.{name}")
        tool: Callable[..., None] = getattr(module, name)
        return tool

    def __iter__(self) -> Iterator[str]:
        return iter(SENTENCES)

    def __len__(self) -> int:
        return len(SENTENCES)


def _named(name: str) -> str:
    """A name as Python has it: `from` and `import` are keywords there."""
    return f"{name}_" if keyword.iskeyword(name) else name


TOOLS = _Tools()


class Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the text below the options."""
