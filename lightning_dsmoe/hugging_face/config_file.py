"""The config.json of a model of transformers, of unknown origin.

Every field is read with bounds, and what is wrong or not supported is collected, so that a person
sees all problems at once. Nothing of transformers is imported for it.
"""

from pathlib import Path
from reprlib import repr as short_repr
from typing import Annotated, Any

from lightning_dsmoe.files import read_json
from lightning_dsmoe.reading import Bounds, check_json
from lightning_dsmoe.serialization.class_paths import MAX_SIZE

_MISSING = object()
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Ours by those of transformers."""


class ConfigFile:
    """The fields of a configuration, and the problems that were found while reading them.

    Each reader returns the default where a field is missing or null, and something of the right
    kind where it is wrong; `finish` then raises.

    Args:
        fields: parsed JSON.
        name: what messages call it.

    Raises:
        ValueError: if it is no object.

    Examples:
        >>> config = ConfigFile({"hidden_size": 64, "num_hidden_layers": 0}, "config.json")
        >>> config.size("hidden_size"), config.size("num_hidden_layers")
        (64, 1)
        >>> config.problems
        ['num_hidden_layers must be an integer from 1 to 16777216, got 0']
    """

    def __init__(self, fields: object, name: str) -> None:
        if not isinstance(fields, dict):
            raise ValueError(f"{name} must be an object, got {short_repr(fields)}")
        self.fields: dict[str, Any] = fields
        self.name = name
        self.problems: list[str] = []

    def has(self, name: str) -> bool:
        """Whether a field is there and not null."""
        return self.fields.get(name) is not None

    def size(self, *names: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        """A positive integer, under the first of several names that is there."""
        return int(self._read(names, Annotated[int, Bounds(1, most)], default, 1))

    def count(self, name: str, default: int = 0) -> int:
        """An integer from 0 on."""
        return int(self._read((name,), Annotated[int, Bounds(0, MAX_SIZE)], default, 0))

    def number(
        self, name: str, default: float, *, least: float = 1e-30, most: float = 1e30
    ) -> float:
        """A positive number."""
        return float(self._read((name,), Annotated[float, Bounds(least, most)], default, 1.0))

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        return bool(self._read((name,), bool, default, default))

    def layers(self, name: str, n_layers: int) -> frozenset[int]:
        """Numbers of layers."""
        numbers = Annotated[int, Bounds(0, n_layers - 1)]
        return frozenset(self._read((name,), list[numbers], [], []))

    def activation(self, name: str, default: str) -> str:
        """The activation function, by our name."""
        given = self._read((name,), str, default, default)
        if given not in _ACTIVATIONS:
            self.refuse(name, f"one of {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS.get(given, "silu")

    def refuse(self, name: str, supported: str) -> None:
        """Note that the value of a field is not supported, and what is."""
        given = short_repr(self.fields.get(name))
        self.problems.append(f"{name}={given} is not supported; what is: {supported}")

    def refuse_unless(self, name: str, allowed: tuple[object, ...], supported: str) -> None:
        """Refuse a field that is there with a value other than these."""
        value = self.fields.get(name)
        if value is not None and not any(value == one for one in allowed):
            self.refuse(name, supported)

    def finish(self) -> None:
        """Raise one ValueError that lists all problems, if there are any."""
        if self.problems:
            raise ValueError(f"{self.name}: {'; '.join(dict.fromkeys(self.problems))}")

    def _read(self, names: tuple[str, ...], kind: Any, default: Any, stand_in: Any) -> Any:
        name = next((each for each in names if self.has(each)), names[0])
        value = self.fields.get(name)
        if value is None:
            if default is None:
                self.problems.append(f"{' or '.join(names)} is missing")
                return stand_in
            return default
        try:
            return check_json(name, value, kind)
        except ValueError as error:
            self.problems.append(str(error).replace(f"{name}: {name}", name))
            return stand_in


def read_config(directory: Path) -> ConfigFile:
    """Read the config.json of a directory.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not JSON, or no object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json in {directory}, which a model of transformers has")
    return ConfigFile(read_json(path), str(path))
