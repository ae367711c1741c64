"""Mistakes in a YAML configuration that YAML itself would silently accept."""

import re

import yaml

_SECTIONS = ("model", "data", "trainer")
_NULL, _STRING = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"


def options_in(content: str, name: str) -> str:
    """Return the YAML of a configuration; that of an empty file is `{}`.

    Args:
        content: the text of the file.
        name: its name, for messages.

    Raises:
        ValueError: if it is not YAML or not a mapping, is nested too deeply, has an option without
            a name or a key twice, of which YAML would take the last, or an empty section, which
            would override the whole section of an earlier configuration.

    Examples:
        >>> options_in("trainer: {max_steps: 1, max_steps: 2}", "my.yaml")
        Traceback (most recent call last):
        ...
        ValueError: my.yaml names 'max_steps' twice, in line 1, column 25
    """
    try:
        root = yaml.compose(content, Loader=yaml.SafeLoader)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        reason = " ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"{name} is not YAML: {reason}{_place(error.problem_mark)}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {error}") from None
    if root is None or root.tag == _NULL:
        return "{}"
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else repr(root.value)
        raise ValueError(f"{name} must hold options such as `seed_everything: 1`, got {kind}")
    _check_unique(root, name)
    for key, value in root.value:
        if key.tag != _STRING or not key.value:
            where = _place(key.start_mark)
            raise ValueError(f"{name} has {key.value!r} for the name of an option{where}")
        if key.value in _SECTIONS and value.tag == _NULL:
            raise ValueError(f"{name} has nothing under {key.value!r}{_place(key.start_mark)}")
    return content


def _check_unique(node: yaml.Node, name: str) -> None:
    if isinstance(node, yaml.ScalarNode) and re.search("[\ud800-\udfff]", node.value):
        raise ValueError(f"{name} escapes half a character{_place(node.start_mark)}")
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_unique(value, name)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"{name} has a key that is not a name{_place(key.start_mark)}")
            if key.value in seen and key.value != "<<":  # which merges, and may do so repeatedly
                raise ValueError(f"{name} names {key.value!r} twice{_place(key.start_mark)}")
            seen.add(key.value)
            _check_unique(value, name)


def _place(mark: yaml.Mark | None) -> str:
    return "" if mark is None else f", in line {mark.line + 1}, column {mark.column + 1}"
