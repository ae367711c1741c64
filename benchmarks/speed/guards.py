"""What the guards of training cost: the quickstart with them and without, in turns.

    python -m benchmarks.speed.guards --threads 1

The guards are the checks that losses and gradients are finite, the random state that is noted in
each batch, `SkipNonFiniteSteps`, `RouterCollapseAlarm` and `ExpertUtilizationMonitor`. Within one
fit, blocks of steps run with all of them and with none. The ratio is the median over rounds of the
seconds with guards over those without. The two monitors report once in a block, more often than the
quickstart has them. What a safe checkpoint costs beyond Lightning's own is timed by itself, in
turns, and spread over the steps from one checkpoint of the quickstart to the next.
"""

import argparse
import sys
import tempfile
import time
from functools import partial
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO

from benchmarks.timing import compare, interleave, machine
from lightning_dsmoe.callbacks import (
    ExpertUtilizationMonitor,
    RouterCollapseAlarm,
    SkipNonFiniteSteps,
)
from lightning_dsmoe.cli import cli_main
from lightning_dsmoe.training.checkpoint_io import SafeCheckpointIO

STEPS_OF_A_CHECKPOINT = 250
"""Of the quickstart, which saves after each validation."""
GUARDS = (SkipNonFiniteSteps, RouterCollapseAlarm, ExpertUtilizationMonitor)


class GuardsInTurns(Callback):
    """Switches the guards of a fit on and off after each block of steps, and times the blocks.

    Args:
        steps: steps in a block.
        skip: blocks before the first that counts.
    """

    def __init__(self, *, steps: int, skip: int = 2) -> None:
        self.steps, self.skip = steps, skip
        self.guarded: list[float] = []
        self.bare: list[float] = []
        self.checkpoints: tuple[float, float] | None = None
        self._all: list[Callback] = []
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._all = trainer.callbacks  # type: ignore[attr-defined]
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        block, rest = divmod(trainer.fit_loop.total_batch_idx + 1, self.steps)
        if rest:
            return
        seconds = (time.perf_counter() - self._start) / self.steps
        if block > self.skip:
            (self.bare if block % 2 == 0 else self.guarded).append(seconds)
        self._switch(trainer, pl_module, on=block % 2 == 0)
        self._start = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._switch(trainer, pl_module, on=True)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint()
            path = Path(folder, "checkpoint.ckpt")
            saved = interleave(
                partial(SafeCheckpointIO().save_checkpoint, checkpoint, path),
                partial(TorchCheckpointIO().save_checkpoint, checkpoint, path),
                rounds=9,
                calls=1,
            )
        self.checkpoints = saved.candidate, saved.reference

    def _switch(self, trainer: Trainer, pl_module: Any, *, on: bool) -> None:
        bare = [each for each in self._all if not isinstance(each, GUARDS)]
        trainer.callbacks = self._all if on else bare  # type: ignore[attr-defined]
        replaced = {
            (pl_module, "configure_gradient_clipping"): partial(
                LightningModule.configure_gradient_clipping, pl_module
            ),
            (pl_module._random_state, "begin_batch"): lambda: None,
            (pl_module._step_losses, "add"): lambda *_: None,
        }
        for (owner, name), unguarded in replaced.items():
            if on:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = unguarded


def measure(*, rounds: int, steps: int, overrides: tuple[str, ...] = ()) -> GuardsInTurns:
    """Fit the quickstart.

    Args:
        rounds: rounds of one block of each side.
        steps: steps in a block.
        overrides: further arguments of the command line.
    """
    config = files("lightning_dsmoe.cli_configs").joinpath("quickstart.yaml")
    callbacks = "lightning_dsmoe.callbacks."
    with tempfile.TemporaryDirectory() as folder:
        sys.argv[1:] = [
            "fit",
            f"--config={config}",
            f"--trainer.logger.init_args.save_dir={folder}",
            f"--trainer.max_steps={(2 * rounds + 2) * steps}",
            "--trainer.val_check_interval=1000000",
            "--trainer.limit_val_batches=0",
            "--trainer.callbacks=" + callbacks + "ExpertUtilizationMonitor",
            f"--trainer.callbacks.every_n_steps={steps}",
            f"--trainer.callbacks.window={max(1, steps // 10)}",
            "--trainer.callbacks+=" + callbacks + "SkipNonFiniteSteps",
            "--trainer.callbacks+=" + callbacks + "RouterCollapseAlarm",
            f"--trainer.callbacks.every_n_steps={steps}",
            "--trainer.callbacks+=benchmarks.speed.guards.GuardsInTurns",
            f"--trainer.callbacks.steps={steps}",
            *overrides,
        ]
        trainer = cli_main().trainer
    # By name: under `python -m` this file is there twice.
    [turns] = [c for c in trainer.callbacks if type(c).__name__ == GuardsInTurns.__name__]
    return turns


def main() -> None:
    """Measure, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads of torch; its default if left out")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of one block of each side")
    parser.add_argument("--steps", type=int, default=20, help="steps in a block")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(table(measure(rounds=options.rounds, steps=options.steps)))


def table(turns: GuardsInTurns) -> str:
    """A few lines."""
    assert turns.checkpoints is not None
    comparison = compare(turns.bare, turns.guarded)
    low, high = comparison.spread
    safe, plain = turns.checkpoints
    saving = (safe - plain) / STEPS_OF_A_CHECKPOINT / median(turns.bare)
    on = machine()
    return (
        f"{on['cpu']}, {on['threads']} threads, torch {on['torch']}, {on['date']}\n"
        f"a step with guards {1e3 * comparison.reference:.2f} ms, without "
        f"{1e3 * comparison.candidate:.2f} ms: ratio {comparison.ratio:.4f}, quartiles {low:.4f} "
        f"to {high:.4f}, {len(turns.bare)} rounds\n"
        f"a checkpoint {1e3 * safe:.1f} ms, by Lightning's own plugin {1e3 * plain:.1f} ms: "
        f"{saving:+.4f} of a step's time, one in {STEPS_OF_A_CHECKPOINT} steps\n"
        f"all together {comparison.ratio + saving:.4f}"
    )


if __name__ == "__main__":
    main()
