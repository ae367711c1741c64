"""A file of options, before the options in it are looked at."""

import yaml

_SECTIONS = ("model", "data", "trainer")
_NULL = "tag:yaml.org,2002:null"


def options_in(content: str, name: str) -> str:
    """Return the YAML of a file of options; one that holds nothing adds nothing.

    Args:
        content: What the file holds.
        name: Its name, for messages.

    Raises:
        ValueError: If it is not YAML or no mapping, names an option twice, of which YAML would
            silently take the last, or has a section without content, which would clear it.
    """
    try:
        root = yaml.compose(content, Loader=yaml.SafeLoader)
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
        if key.value in _SECTIONS and value.tag == _NULL:
            raise ValueError(f"{name} has nothing under {key.value!r}{_place(key.start_mark)}")
    return content


def _check_unique(node: yaml.Node, name: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_unique(value, name)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"{name} has a key that is no name{_place(key.start_mark)}")
            if key.value in seen and key.value != "<<":  # which merges, and may do so repeatedly
                raise ValueError(f"{name} names {key.value!r} twice{_place(key.start_mark)}")
            seen.add(key.value)
            _check_unique(value, name)


def _place(mark: yaml.Mark | None) -> str:
    return "" if mark is None else f", in line {mark.line + 1}, column {mark.column + 1}"
