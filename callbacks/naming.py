"""Names of plans and artifacts, as loggers and folders have them."""

import re


def check_name(what: str, name: object) -> None:
    """Check that a name can be a part of metric names, and a folder.

    Raises:
        ValueError: if it is not a string or has characters beyond letters, digits, `_`, `.`, `+`
            and `-`, which loggers and the file names of checkpoints split at or refuse.
    """
    if not isinstance(name, str):
        raise ValueError(f"{what} must be a string, got {name!r}: write it in quotes in YAML")
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(
            f"{what} must begin with a letter, a digit or _, followed by any of these and . + -, "
            f"got {name!r}"
        )
