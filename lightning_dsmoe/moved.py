"""Modules and options that had other names in version 0.1; the old names go with version 0.3.

Modules are those with a class or function that a user may have typed, or that a file may name.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial, wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from operator import attrgetter
from types import ModuleType
from typing import Any, TypeVar, cast

Named = TypeVar("Named", bound=Callable[..., Any])  # a function or a class

_PACKAGE = "lightning_dsmoe"
MOVED = {
    "routing.gate_scale": "routing.routing",
    "experts.layer": "experts.feed_forward",
    "inference.architecture": "serialization.architecture",
    "inference.checkpoint": "serialization.checkpoint",
    "inference.pruning": "serialization.pruning",
    "language_model": "training.language_model",
    "parameter_groups": "training.optimization",
    "checkpoint_io": "training.checkpoint_io",
    "inference.model_card": "inference.artifact.model_card",
    "inference.engine.rows": "inference.engine.weights.row_major",
    "inference.engine.tiles": "inference.engine.weights.tiled",
    "inference.engine.head": "inference.engine.weights.int8_head",
    "analysis.pruning": "analysis.unused_experts",
    "analysis.utilization": "analysis.report.utilization",
    "data.tokenizers": "tokenizers",
    "callbacks.console": "training.console",
}


def current_name(module: str) -> str:
    """The name of a module today, which was perhaps moved."""
    package, _, name = module.partition(".")
    return f"{package}.{MOVED[name]}" if package == _PACKAGE and name in MOVED else module


class _Moved(MetaPathFinder, Loader):
    """Finds a moved module by its old name, as a module with the same objects.

    A finder, rather than files of the old names, keeps old names out of the folders, and covers
    `import`, `importlib`, pickles and the class paths in configurations alike.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if current_name(fullname) != fullname else None

    def exec_module(self, module: ModuleType) -> None:
        new = current_name(module.__name__)
        warn_renamed(module.__name__, new)
        names = vars(import_module(new)).items()
        vars(module).update({name: value for name, value in names if not name.startswith("__")})


def find_moved_modules() -> None:
    """Let imports of old module names work, after a search for modules of that name failed."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())


def warn_renamed(old: str, new: str) -> None:
    """Warn whoever called the caller that a public name has changed."""
    message = f"{old} is now {new}; the old name goes with version 0.3"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


def renamed_objects(module: str, **objects: object) -> Callable[[str], object]:
    """The `__getattr__` of a module that gives objects by their old names too, with a warning.

    Args:
        module: name of the module.
        objects: by old name, the class or function that took its place.
    """

    def get(name: str) -> object:
        if name not in objects:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", cast(type, objects[name]).__name__)
        return objects[name]

    return get


def renamed_options(**new_names: str) -> Callable[[Named], Named]:
    """Let a function take keyword options by their old names too, with a warning.

    Args:
        new_names: the present name of each old one.
    """

    def decorate(function: Named) -> Named:
        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            for old in new_names.keys() & options.keys():
                name = function.__qualname__.removesuffix(".__init__")
                warn_renamed(f"{name}({old}=)", f"{new_names[old]}=")
                options[new_names[old]] = options.pop(old)
            return function(*args, **options)

        return cast(Named, call)

    return decorate


def renamed_attributes(**new_names: str) -> Callable[[Named], Named]:
    """Let attributes of a class be read and set by their old names too, with a warning.

    Args:
        new_names: the present name of each old one, which may be that of an attribute's attribute.
    """

    def get(new: str, old: str, instance: object) -> Any:
        warn_renamed(f"{type(instance).__name__}.{old}", new)
        return attrgetter(new)(instance)

    def assign(new: str, old: str, instance: object, value: Any) -> None:
        warn_renamed(f"{type(instance).__name__}.{old}", new)
        owner, _, name = new.rpartition(".")
        setattr(attrgetter(owner)(instance) if owner else instance, name, value)

    def decorate(owner: Named) -> Named:
        for old, new in new_names.items():
            setattr(owner, old, property(partial(get, new, old), partial(assign, new, old)))
        return owner

    return decorate
