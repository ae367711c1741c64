"""Files that version 0.1 wrote still load, mean the same and can be resumed.

They come from three steps of `fit` with the quickstart's configuration at the sizes below; the
model in 8 bits is the same checkpoint. The numbers are what that version computed.
"""

import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from lightning_dsmoe import load_sparse
from lightning_dsmoe.cli import cli_main
from lightning_dsmoe.commands.certify import certify
from lightning_dsmoe.inference import load_decoder
from lightning_dsmoe.routing import SelectionPlan, Threshold, TopK

FOLDER = Path(__file__).parent / "files_v0_1"
CHECKPOINT = FOLDER / "checkpoint.ckpt"
PLAN = SelectionPlan(experts=TopK(2), attention=Threshold(0.5))
TOKENS = torch.tensor([list(b"def f1")])
LOGITS = {  # of the first tokens, after the last of TOKENS
    "dense": [-0.071629, 0.012243, 0.029180, 0.005401, -0.071810, 0.159641, -0.059095],
    "sparse": [-0.071773, 0.011357, 0.029001, 0.003308, -0.070863, 0.160255, -0.057919],
    "sparse_int8": [-0.071745, 0.010899, 0.028898, 0.002241, -0.070593, 0.160194, -0.057839],
}
SIXTH_LOSS = 5.48274
"""Training loss of the sixth step, the third one after resuming."""

ROUTER = {"class_path": "lightning_dsmoe.routing.LinearRouter", "init_args": {"init_std": 1.0}}
SIZES = {
    "d_model": 16,
    "n_layers": 2,
    "dropout": 0.1,
    "feed_forward.init_args.n_experts": 4,
    "feed_forward.init_args.d_expert": 8,
    "feed_forward.init_args.router": ROUTER,
    "attention.init_args.d_head": 4,
    "attention.init_args.router": ROUTER,
    "lr_scheduler.init_args.warmup_steps": 2,
}


def check(logits: torch.Tensor, name: str) -> None:
    expected = torch.tensor(LOGITS[name])
    torch.testing.assert_close(logits[0, -1, : len(expected)], expected, rtol=0, atol=2e-6)


def test_checkpoint_loads() -> None:
    loaded = load_decoder(CHECKPOINT)
    assert (loaded.context, loaded.val_fraction, loaded.test_fraction) == (16, 0.05, 0.05)
    with torch.inference_mode():
        check(loaded.decoder(TOKENS).logits, "dense")


@pytest.mark.parametrize("name", ["sparse", "sparse_int8"])
def test_artifact_loads(name: str) -> None:
    model = load_sparse(FOLDER / name)
    assert model.plan == PLAN
    check(model.logits(TOKENS), name)


def test_plan_loads() -> None:
    assert SelectionPlan.load(FOLDER / "sparse" / "plan.json") == PLAN


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """The text that the files were made from."""
    path = tmp_path / "text.txt"
    path.write_text(
        "".join(f"def f{i}(x):\n    return x * {i} # é€\n" for i in range(200)), encoding="utf-8"
    )
    return path


def test_certificate_holds(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_compiles: None
) -> None:
    monkeypatch.chdir(tmp_path)
    certify(str(FOLDER / "sparse"), ckpt_path=str(CHECKPOINT), files=str(text))


def test_training_is_resumed(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_compiles: None
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-dsmoe"])
    sizes = [f"--model.init_args.{name}={value}" for name, value in SIZES.items()]
    cli = cli_main(
        [
            "fit",
            "-c",
            str(files("lightning_dsmoe").joinpath("cli_configs", "quickstart.yaml")),
            *sizes,
            f"--data.init_args.files={text}",
            f"--data.init_args.cache_dir={tmp_path}",
            "--data.init_args.context=16",
            "--data.init_args.batch_size=2",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=6",
            "--trainer.limit_val_batches=0",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            "--trainer.log_every_n_steps=1",
            "--trainer.callbacks=[]",
            "--trainer.enable_checkpointing=false",
            f"--trainer.logger.init_args.save_dir={tmp_path}",
            f"--ckpt_path={CHECKPOINT}",
        ]
    )
    assert cli.trainer.global_step == 6
    loss = cli.trainer.callback_metrics["train/loss"].item()
    assert loss == pytest.approx(SIXTH_LOSS, abs=2e-4)
