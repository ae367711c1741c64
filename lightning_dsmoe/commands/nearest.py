"""Names that are meant, where one was typed that is not there."""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

import jsonargparse

_FEW = 12
"""Up to so many names are all listed."""
_NEAREST = 3
_NO_OPTION = re.compile(r"(?:unrecognized arguments: --|does not accept option \')([\w.]+)")
_NO_NAME = re.compile(r"unrecognized arguments: (?!-)")


def among(given: str, names: Sequence[str]) -> str:
    """The names there are, or of many those that are nearest to the one that was given.

    Examples:
        >>> from lightning_dsmoe.commands.nearest import among
        >>> among("TopQ", ["AllExperts", "Threshold", "TopK"])
        'known classes: AllExperts, Threshold, TopK'
        >>> among("Model10", [f"Model{number}0" for number in range(20)])
        'the nearest of 20 known classes: Model10, Model190, Model180'
    """
    if len(names) <= _FEW:
        return f"known classes: {', '.join(names)}"
    name = given.rpartition(".")[2]
    near = get_close_matches(name, names, _NEAREST, cutoff=0)
    return f"the nearest of {len(names)} known classes: {', '.join(near)}"


def nearest_options(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """What to add to a message about an option that there is not; "" for any other message.

    Args:
        message: of jsonargparse.
        parser: the one that wrote it.
    """
    if _NO_NAME.search(message):
        names = [name for name in _options(parser) if not re.search(r"\.|config$", name)]
        return f"; each value follows its option, such as --{names[0]}" if names else ""
    if (found := _NO_OPTION.search(message)) is None:
        return ""
    near = get_close_matches(found[1], sorted({*_options(parser)}), _NEAREST)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _options(parser: jsonargparse.ArgumentParser) -> Iterator[str]:
    """Names of all options of a parser and of its subcommands."""
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for subcommand in action.choices.values():
                yield from _options(subcommand)
        elif not action.dest.endswith("help"):
            yield action.dest
