"""Mistakes on the command line, said in one line.

jsonargparse gives every class in a configuration a parser of its own and reports a mistake as the
tree of all readings that it tried. Every one of these parsers, from the innermost out, calls its
`error`, and it knows the option's type. So the innermost one says what was wrong, and the tree is
never taken apart; nothing of it is needed but the key at its beginning and the value at its end.
"""

import os
import re
import sys
import traceback
from collections import deque
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import jsonargparse
from jsonargparse import Namespace

from lightning_dsmoe.commands.configuration_file import options_in
from lightning_dsmoe.commands.nearest import among, nearest_options
from lightning_dsmoe.commands.own_code import own_place
from lightning_dsmoe.commands.type_names import class_names, in_words, plainer
from lightning_dsmoe.files import check_mark

DEBUG = "JSONARGPARSE_DEBUG"
_KEY = re.compile(r'Parser key "([\w.]+)"[^:]*: ?')
_VALUE = re.compile(r"(?:Got|Given) value: (?:NestedArg\(.*val=)?(.*?)\)?$")
_SURROGATES = r"'[\w-]+' codec can't encode (characters?.*?): surrogates not allowed"


class _Level(NamedTuple):
    """A mistake as one parser sees it; its message contains those of the parsers inside it."""

    parser: jsonargparse.ArgumentParser
    message: str
    cause: str

    @property
    def key(self) -> str:
        """The option at fault; "" if the parser has no such option."""
        found = _KEY.match(self.message)
        return found[1] if found else ""

    def __str__(self) -> str:
        message = _KEY.sub("", self.message, count=1)
        hints = {action.dest: getattr(action, "_typehint", None) for action in self.parser._actions}
        hint = hints.get(self.key)
        found = _VALUE.search(message)
        got = f", got {found[1]}" if found and "Namespace(" not in found[1] else ""
        if classes := class_names(hint):
            cause = plainer(self.cause)
            cause += "" if found and found[1] in cause else got
            return f"{cause}; {among(cause.rpartition(' ')[2], classes)}"
        if hint is not None and re.match("Expected an? |Does not validate", message):
            *names, last = in_words(hint)
            return f"expected {', '.join(names)}{' or ' if names else ''}{last}{got}"
        owner = getattr(self.parser, "owner", None)
        if "is not accepted" in message and owner is not None:
            options = ", ".join(name for name in hints if "help" not in name)
            return f"{message}; {owner.__name__} has {options}"
        required = re.match(r"the following arguments are required: ([\w, ]+)$", message)
        if required and owner is None:  # else they are of a class, not of the command
            options = ", ".join(f"--{name}" for name in required[1].split(", "))
            return f"the following options are required: {options}"
        return plainer(message) + nearest_options(message, self.parser)


class OneLineErrors(jsonargparse.ArgumentParser):
    """Says a mistake in one line, unless a traceback is asked for."""

    _levels: ClassVar[deque[_Level]] = deque(maxlen=64)

    def add_class_arguments(self, class_type: type, *args: Any, **kwargs: Any) -> list[str]:
        self.owner = class_type
        names: list[str] = super().add_class_arguments(class_type, *args, **kwargs)
        return names

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Namespace:
        try:
            parsed: Namespace = super().parse_path(path, *args, **kwargs)
        except UnicodeDecodeError as error:
            reason = f"{path} is not a text file in UTF-8: {error}"
            try:
                check_mark(Path(path))
            except ValueError as marked:
                reason = str(marked)
            self.error(reason)
        return parsed

    def parse_string(
        self, content: str, path: str | os.PathLike[str] = "", *args: Any, **kwargs: Any
    ) -> Namespace:
        if not path and not content:  # as where a shell's variable is not set
            self.error("config must name a file, got ''")
        try:
            content = options_in(content, str(path or "config"))
        except ValueError as error:
            self.error(str(error), error)
        parsed: Namespace = super().parse_string(content, path, *args, **kwargs)
        return parsed

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        cause: BaseException | None = ex
        while cause is not None and cause.__cause__ is not None:
            cause = cause.__cause__
        self._levels.append(_Level(self, one_line(message), one_line(str(cause))))
        if DEBUG in os.environ or not self.exit_on_error:
            super().error(message, ex)
        if cause is not None and own_place(cause) is not None:  # such as while it was imported
            fail(in_one_line(cause), code=2)
        fail(_furthest(self._levels), code=2)


def in_one_line(error: BaseException) -> str:
    """What an error says, and the place in a user's own code that failed.

    While it makes the objects of a configuration, jsonargparse raises an error of its own about all
    readings of a value, and names the one that a constructor raised as its cause.
    """
    while error.__cause__ is not None and _raised_in(error) == "jsonargparse":
        error = error.__cause__
    message = one_line(str(error.msg if isinstance(error, SyntaxError) else error))
    if (place := own_place(error)) is None:
        return message or type(error).__name__
    words = ": ".join(filter(None, (type(error).__name__, message)))
    return f"{words}, raised in {place}; --debug shows the traceback"


def _raised_in(error: BaseException) -> str:
    """The package whose code raised an error."""
    modules = [f.f_globals.get("__name__", "") for f, _ in traceback.walk_tb(error.__traceback__)]
    return str(modules[-1]).partition(".")[0] if modules else ""


def fail(message: str, *, code: int) -> NoReturn:
    """Print a mistake and end the process."""
    print(f"lightning-dsmoe: error: {message}", file=sys.stderr)
    sys.exit(code)


def one_line(message: str) -> str:
    """A message without line breaks and colors."""
    message = re.sub(r"\x1b\[[\d;]*m", "", message)
    # Bytes of the command line that are not UTF-8 reach Python as surrogates.
    return " ".join(re.sub(_SURROGATES, r"not UTF-8, \1", message).split())


def _furthest(levels: deque[_Level]) -> str:
    """Of the readings that the last parser's mistake contains, say the one that came furthest."""
    paths: list[list[_Level]] = []
    for level in levels:
        inside = [p for p in paths if p[0].message in level.message != p[0].message]
        paths.append([level, *max(inside, key=lambda p: sum(bool(e.key) for e in p), default=[])])
    keys = ".".join(level.key for level in paths[-1] if level.key)
    return ": ".join(filter(None, (keys, str(paths[-1][-1]))))
