"""Where code that is neither the library's nor an installed package's failed."""

import os
import sysconfig
import traceback
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_INSTALLED = {"site-packages", "dist-packages"}


def own_place(error: BaseException) -> str | None:
    """File, line and function of a user's own code where an error was raised, or passed last.

    None if only the library, its dependencies and Python's own modules were running.
    """
    if isinstance(error, SyntaxError) and error.filename and _is_own(error.filename):
        return f"{_short(error.filename)}, line {error.lineno}"
    own = [each for each in traceback.extract_tb(error.__traceback__) if _is_own(each.filename)]
    if not own:
        return None
    return f"{_short(own[-1].filename)}, line {own[-1].lineno}, in {own[-1].name}"


def _is_own(file: str) -> bool:
    path = Path(file)
    others = _PACKAGE, _PACKAGE.parent / "callbacks", Path(sysconfig.get_path("stdlib"))
    return (
        path.is_file()  # rather than code that was made as text, such as <string>
        and not _INSTALLED & set(path.parts)
        and not any(path.resolve().is_relative_to(other.resolve()) for other in others)
    )


def _short(file: str) -> str:
    """The path from the current folder if the file is in it."""
    path = Path(file)
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else file
