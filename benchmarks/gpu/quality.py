"""nanoGPT's recipe of 10.7 M parameters trained as DS-MoE, for `python -m benchmarks.gpu`.

The runs are those of `reproduce.py --preset gpu --steps 1000`; its JSON file of them is kept too.
"""

import json
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from lightning import Callback, LightningModule, Trainer

from benchmarks.gpu.record import Measurement, Row
from benchmarks.quality import reproduce
from benchmarks.quality.runs import carry_out
from lightning_dsmoe.files import write_text

MODEL = "DS-MoE, faint MI, finished consistently by turns"
PRESET, STEPS = "gpu", 1000
NOTES = (
    f"{MODEL}, `reproduce.py --preset {PRESET} --steps {STEPS}`: first the validation loss while "
    "it trains, under the plan of that step, then the losses of the best weights by rule and share "
    "of the hidden parameters, on the whole validation split."
)


class TimeIsUp(Exception):
    """A run would not end in time."""


class Watch(Callback):
    """Tells of each validation, and ends a run that takes too long."""

    tell: ClassVar[Callable[[int, float], None]]
    """What is told; on the class, as the command line makes the callback from plain data."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            type(self).tell(trainer.global_step, float(trainer.callback_metrics["val/loss"]))


def quality(
    text: Path,
    runs: Path,
    until: float,
    add: Callable[[Sequence[Row]], None],
    *,
    seeds: Sequence[int] = (1, 2, 3),
    preset: str = PRESET,
    steps: int = STEPS,
) -> list[Measurement]:
    """One seed after another; those in the file of runs are not repeated.

    Args:
        text: the text, whose last tenth is for validation.
        runs: JSON file of finished runs, as `reproduce.py` keeps it.
        until: time by `time.monotonic()` after which a run is cut off at its next validation.
        add: keeps rows of a run under way.
        seeds: of the weights and of the order of the text.
        preset: one of `reproduce.py`.
        steps: optimizer steps.
    """
    return [
        Measurement({"seed": seed}, partial(_run, settings, runs, text, until, add))
        for seed in seeds
        for settings in [reproduce.settings(MODEL, preset, seed=seed, steps=steps, text=text)]
    ]


def _run(
    settings: dict[str, Any],
    runs: Path,
    text: Path,
    until: float,
    add: Callable[[Sequence[Row]], None],
) -> list[Row]:
    done = json.loads(runs.read_text("utf-8")) if runs.exists() else []
    result = reproduce.find(settings, done)
    if result is None:
        seed = settings["configuration"]["seed_everything"]
        last = settings["configuration"]["trainer"]["max_steps"]

        def tell(step: int, loss: float) -> None:
            add([{"seed": seed, "rule": f"after step {step}", "loss": loss}])
            if step < last and time.monotonic() > until:
                raise TimeIsUp(f"cut off after step {step}")

        Watch.tell = tell
        watched = deepcopy(settings)
        callbacks = watched["configuration"]["trainer"]["callbacks"]
        callbacks.append({"class_path": "benchmarks.gpu.quality.Watch"})
        result = carry_out(watched, str(text), 1) | {"settings": settings}
        write_text(runs, json.dumps([*done, result], indent=1) + "\n")
    return [*result["points"], {"rule": "trained and measured", "seconds": result["seconds"]}]
