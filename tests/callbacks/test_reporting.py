from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure

from lightning_dsmoe.callbacks.reporting import log_figure, log_scalars


class Board(TensorBoardLogger):
    """Collects figures instead of writing events."""

    def __init__(self) -> None:
        self.figures: list[tuple[str, Figure, int]] = []

    experiment = property(lambda self: self)  # type: ignore[assignment]

    def add_figure(self, name: str, figure: Figure, global_step: int) -> None:
        self.figures.append((name, figure, global_step))


class Biases(WandbLogger):
    """Collects images instead of sending them."""

    def __init__(self) -> None:
        self.images: list[tuple[str, list[Any]]] = []

    def log_image(self, key: str, images: list[Any], step: Any = None, **kwargs: Any) -> None:
        self.images.append((key, images))


def test_figure_goes_to_a_file_and_to_the_loggers_that_take_images(tmp_path: Path) -> None:
    figure = Figure()
    figure.subplots().plot([1, 2])
    board, biases = Board(), Biases()
    trainer: Any = SimpleNamespace(loggers=[CSVLogger(tmp_path), board, biases], global_step=7)
    path = tmp_path / "new folder" / "figure.png"
    log_figure(trainer, "use", figure, path)
    assert matplotlib.image.imread(path).std() > 0
    assert board.figures == [("use", figure, 7)]
    assert biases.images == [("use", [str(path)])]


def test_scalars_go_to_every_logger_and_to_other_callbacks(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name=name) for name in ("one", "two")]
    trainer: Any = SimpleNamespace(loggers=loggers, global_step=3, callback_metrics={})
    log_scalars(trainer, {"a/b": 0.5})
    for logger in loggers:
        logger.save()
        text = (Path(logger.log_dir) / "metrics.csv").read_text()
        assert text.split() == ["a/b,step", "0.5,3"]
    assert trainer.callback_metrics["a/b"] == 0.5
