"""Names of a module that are imported when they are first used."""

import sys
from collections.abc import Callable
from importlib import import_module

_PACKAGE = "lightning_dsmoe"


def imported_on_use(module: str, **modules: str) -> Callable[[str], object]:
    """The `__getattr__` of a module some of whose names are imported when they are first used.

    So that what is quick to import does not wait for PyTorch, Lightning or torchmetrics, each of
    which takes seconds.

    Args:
        module: name of the module.
        modules: for each name, the module of this package that has it.

    Examples:
        >>> from lightning_dsmoe.imports import imported_on_use
        >>> get = imported_on_use("lightning_dsmoe.data", ByteTokenizer="tokenizers")
        >>> get("ByteTokenizer")
        <class 'lightning_dsmoe.tokenizers.ByteTokenizer'>
    """

    def get(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        found = getattr(import_module(f"{_PACKAGE}.{modules[name]}"), name)
        setattr(sys.modules[module], name, found)  # to be found directly from now on
        return found

    return get
