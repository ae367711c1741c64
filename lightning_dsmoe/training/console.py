"""What a training run shows on the console."""

from typing import Any

from lightning.pytorch.callbacks import ModelSummary, ProgressBar, RichProgressBar
from lightning.pytorch.utilities.model_summary.model_summary import (
    get_formatted_model_size,
    get_human_readable_count,
)
from rich import get_console
from rich.table import Table


class TrainingProgress(RichProgressBar):
    """Lightning's progress bar, with no last epoch where a run is as long as its `max_steps`."""

    def _get_train_description(self, current_epoch: int) -> str:
        # Lightning 2.6.6 writes "Epoch 0/-2" where max_epochs is -1.
        return super()._get_train_description(current_epoch).replace("/-2", "   ")


class ParameterSummary(ModelSummary):
    """Lightning's summary of a model without its FLOPs.

    It counts them on an example input, which a language model of any context length does not have,
    and writes 0 without one.
    """

    @staticmethod
    def summarize(summary_data: list[tuple[str, list[str]]], *sizes: Any, **_: Any) -> None:
        columns = [(name, cells) for name, cells in summary_data if name != "FLOPs"]
        table = Table(*(name for name, _ in columns), header_style="bold magenta")
        for row in zip(*(cells for _, cells in columns), strict=True):
            table.add_row(*row)
        total, trainable = map(get_human_readable_count, sizes[:2])
        size = get_formatted_model_size(sizes[2])
        get_console().print(table, f"{total} parameters, {trainable} trainable, {size} MB")


def with_console_callbacks(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a Trainer with these callbacks, where they leave the choice to Lightning.

    Args:
        config: arguments of the Trainer; `callbacks` is a list, one callback or None.
    """
    given = config.get("callbacks") or []
    callbacks = [*given] if isinstance(given, list) else [given]

    def is_free(option: str, kind: type) -> bool:
        is_on = config.get(option) is not False and not config.get("barebones")
        return is_on and not any(isinstance(callback, kind) for callback in callbacks)

    if is_free("enable_progress_bar", ProgressBar):
        callbacks.append(TrainingProgress())
    if is_free("enable_model_summary", ModelSummary):
        callbacks.append(ParameterSummary())
        # Else Lightning writes that it adds no summary of its own.
        config = {**config, "enable_model_summary": False}
    return {**config, "callbacks": callbacks}
