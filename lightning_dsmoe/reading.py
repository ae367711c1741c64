"""Parsed JSON of unknown origin, checked against type annotations before anything uses it.

An artifact, a plan or a certificate may come from a stranger. Each bound stops one thing: a length,
a file that takes minutes to walk through; a largest number, an overflow when it is computed with or
formatted; a closed list of fields, a typing error that would silently count as the default.
"""

from collections.abc import Mapping
from dataclasses import is_dataclass
from reprlib import repr as short_repr
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

MAX_LAYERS = 1024
_MOST = 1e300
_PLAIN: dict[object, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("an integer", (int,)),
    float: ("a finite number", (int, float)),
    str: ("a string", (str,)),
    dict: ("an object", (dict,)),
    list: ("a list", (list,)),
    tuple: ("a list", (list,)),  # tuple[int, ...]
}


class Bounds(NamedTuple):
    """Least and largest number, or length of a string or list, that `Annotated` allows."""

    least: float = -_MOST
    most: float = _MOST


Count = Annotated[int, Bounds(0, 2**53 - 1)]
Size = Annotated[int, Bounds(1, 2**53 - 1)]
ShortText = Annotated[str, Bounds(0, 200)]


def check_json(name: str, data: object, kind: Any) -> Any:
    """Raise a ValueError unless parsed JSON is of a kind, and hand it on.

    Args:
        name: what errors call the data.
        data: what `json.loads` returned; numbers that are not finite are refused.
        kind: `bool`, `int`, `float`, `str`, `dict`, a `Literal`, a list or tuple of kinds, any of
            these `| None` or `Annotated` with `Bounds`; for an object a dataclass or `NamedTuple`,
            or a mapping from the names of all its fields to their kinds.

    Returns:
        The same data.

    Raises:
        ValueError: in one line, naming the field, its value and what is allowed.

    Examples:
        >>> from typing import Annotated
        >>> check_json("plan.json", {"k": 2, "eps": None}, {"k": int, "eps": float | None})
        {'k': 2, 'eps': None}
        >>> check_json("plan.json", {"k": 0}, {"k": Annotated[int, Bounds(1, 64)]})
        Traceback (most recent call last):
        ...
        ValueError: plan.json: k must be an integer from 1 to 64, got 0
    """
    _check((name,), data, kind)
    return data


def shown(value: object) -> str:
    """A value as a message shows it: in one line, shortened if it is long.

    Examples:
        >>> shown("x" * 1000)
        "'xxxxxxxxxxxx...xxxxxxxxxxxxx'"
    """
    return f"{' '.join(short_repr(value).split()):.200}"


def check_version(name: str, data: object, version: int) -> None:
    """Raise a ValueError unless parsed JSON is an object in the format that this version reads."""
    if not isinstance(data, dict) or "format_version" not in data:
        raise ValueError(f"{name} must be an object with a format_version")
    found = data["format_version"]
    if type(found) is not int or found != version:
        which = (
            "another" if type(found) is not int else "a newer" if found > version else "an older"
        )
        raise ValueError(
            f"{name} has format {short_repr(found)}, this version reads {version}; {which} version "
            "of lightning_dsmoe may read it"
        )


def _check(where: tuple[str, ...], data: object, kind: Any) -> None:
    optional = NoneType in get_args(kind)
    if optional:
        if data is None:
            return
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
    bounds = None
    if get_origin(kind) is Annotated:
        kind, bounds = get_args(kind)
    allowed, fits = _allowed(kind, data, bounds)
    if not fits:
        null = "null or " if optional else ""
        at = ": ".join(filter(None, (", ".join(where[:-1]), where[-1])))
        raise ValueError(f"{at} must be {null}{allowed}, got {short_repr(data)}")
    fields, parts = _fields(kind), get_args(kind)
    if isinstance(data, dict) and fields is not None:
        wrong = sorted(set(data) ^ set(fields), key=str)
        if wrong:
            raise ValueError(
                f"{', '.join(where)} must have the fields {', '.join(fields)}; missing or unknown: "
                f"{short_repr(wrong)}"
            )
        for name, field in fields.items():
            _check((*where, name), data[name], field)
    elif isinstance(data, list):
        for place, value in enumerate(data):
            part = parts[0 if len(parts) == 1 or parts[-1] is ... else place]
            _check((*where[:-1], f"{where[-1]}[{place}]"), value, part)


def _allowed(kind: Any, data: object, bounds: Bounds | None) -> tuple[str, bool]:
    """What a kind is called, and whether data are of it, aside from what is inside them."""
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return " or ".join(parts), data in list(parts)
    if origin is tuple and ... not in parts:
        return f"a list of {len(parts)}", isinstance(data, list) and len(data) == len(parts)
    words, types = _PLAIN[dict if _fields(kind) is not None else origin]
    fits = isinstance(data, types) and isinstance(data, bool) == (origin is bool)
    least, most = bounds or Bounds()
    size = len(data) if isinstance(data, str | list) else data
    if isinstance(size, int | float):  # NaN is in no range
        fits = fits and least <= size <= most
    if bounds is None:
        return words, fits
    what = "from" if origin in (int, float) else "of length"
    return f"{words} {what} {least} to {most}", fits


def _fields(kind: Any) -> Mapping[str, Any] | None:
    """Names and kinds of an object's fields; None for what is no object of known fields."""
    if isinstance(kind, Mapping):
        return kind
    is_record = is_dataclass(kind) or hasattr(kind, "_fields")
    return get_type_hints(kind, include_extras=True) if is_record else None
