"""One run of `reproduce.py`: a model trained by the command line, then measured under plans."""

import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.quality.finishing import Config
from benchmarks.quality.frontier import measure
from benchmarks.timing import machine
from lightning_dsmoe import SelectionPlan, TopK
from lightning_dsmoe.cli import cli_main
from lightning_dsmoe.commands.evaluation_setup import open_trained
from lightning_dsmoe.routing import AllExperts, Selection

BATCH_TOKENS = 4096


def carry_out(
    settings: Config, text: str, threads: int, keep_as: str | None = None
) -> dict[str, Any]:
    """Train a model and measure it on the whole validation split.

    Args:
        settings: the `configuration` of the run, the `shares` of the hidden parameters to measure
            it at, and the `eps` under which to count its experts.
        text: path of the text.
        threads: threads of torch.
        keep_as: where to keep the checkpoint, if at all.
    """
    torch.set_num_threads(threads)
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    config = settings["configuration"]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        checkpoint = train(config, text, Path(folder))
        seconds = time.perf_counter() - start
        if keep_as is not None:
            Path(keep_as).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint, keep_as)
        trained = open_trained(
            str(checkpoint),
            files=text,
            split="val",
            val_fraction=config["data"]["init_args"]["val_fraction"],
            test_fraction=0.0,
            max_tokens=sys.maxsize,
            batch_tokens=BATCH_TOKENS,
        )
        found = measure(trained, training_plan(config), settings["shares"], settings["eps"])
    counts = trained.counts
    sizes = {"parameters": counts.outside + counts.hidden, "hidden": counts.hidden}
    on = machine(trained.text.device)
    return {"settings": settings, "machine": on, "seconds": seconds, **sizes, **found}


def train(config: Config, text: str, folder: Path) -> Path:
    """Fit as the command line does; gives the checkpoint of the best validation."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    sys.argv[1:] = [
        "fit",
        f"--config={path}",
        f"--data.init_args.files={text}",
        f"--trainer.default_root_dir={folder}",
    ]
    best: str = cli_main().trainer.checkpoint_callback.best_model_path
    return Path(best)


def training_plan(config: Config) -> SelectionPlan:
    """The experts that run in training."""
    model = config["model"]["init_args"]

    def selection(name: str) -> Selection:
        given = model.get(name)
        return AllExperts() if given is None else TopK(given["init_args"]["k"])

    return SelectionPlan(
        experts=selection("expert_selection"),
        attention=selection("attention_selection"),
    )
