"""What a run shows, without rows that say nothing."""

from collections.abc import Callable
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import ModelSummary, RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count

from lightning_dsmoe.training.console import (
    ParameterSummary,
    TrainingProgress,
    with_console_callbacks,
)


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ({}, [TrainingProgress, ParameterSummary]),
        ({"callbacks": None, "enable_progress_bar": False}, [ParameterSummary]),
        ({"enable_model_summary": False}, [TrainingProgress]),
        ({"barebones": True}, []),
        ({"callbacks": TQDMProgressBar()}, [TQDMProgressBar, ParameterSummary]),
        ({"callbacks": [ModelSummary(2)]}, [ModelSummary, TrainingProgress]),
    ],
)
def test_only_what_lightning_would_choose_is_replaced(
    config: dict[str, Any], kinds: list[type]
) -> None:
    options = with_console_callbacks(config)
    assert [type(callback) for callback in options["callbacks"]] == kinds
    trainer = Trainer(**{"accelerator": "cpu", "logger": False, **options})
    shown = [c for c in trainer.callbacks if isinstance(c, RichProgressBar | ModelSummary)]
    assert [type(callback) for callback in shown] == [k for k in kinds if k != TQDMProgressBar]


@pytest.mark.parametrize(("epochs", "shown"), [(-1, "Epoch 0 "), (3, "Epoch 0/2")])
def test_the_last_epoch_is_shown_where_there_is_one(
    epochs: int, shown: str, make_trainer: Callable[..., Trainer]
) -> None:
    progress = TrainingProgress()
    progress._trainer = make_trainer(max_epochs=epochs, max_steps=5)
    description = progress._get_train_description(0)
    assert description.startswith(shown)
    assert "-" not in description
    assert len(description) == len(RichProgressBar._get_train_description(progress, 0))


def test_the_summary_counts_parameters_and_no_operations(
    make_one_model: Callable[..., Any],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make_one_model()
    trainer = make_trainer(callbacks=[ParameterSummary()], max_steps=1)
    trainer.fit(model, make_loader(3), make_loader(3))
    shown = capsys.readouterr().out
    count = sum(parameter.numel() for parameter in model.parameters())
    assert "Decoder" in shown
    assert f"{get_human_readable_count(count)} parameters" in shown
    assert "lops" not in shown.lower()
