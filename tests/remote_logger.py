"""A logger of no file format, as those of services are."""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger


class Remote(Logger):
    """A logger that keeps its records elsewhere, as those of services do."""

    def __init__(self, save_dir: Path | None, *, version: int | str | None = None) -> None:
        super().__init__()
        self._save_dir, self._version = save_dir, version

    @property
    def save_dir(self) -> str | None:
        return None if self._save_dir is None else str(self._save_dir)

    @property
    def name(self) -> str:
        return "project"

    @property
    def version(self) -> int | str | None:
        return self._version

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...
