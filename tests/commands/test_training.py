"""What `fit` and `test` promise beyond Lightning."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_dsmoe import DSMoELanguageModel

pytestmark = pytest.mark.slow

FEED_FORWARD = "--model.init_args.feed_forward.init_args."
OWN_ROUTER = """
import torch
from lightning_dsmoe.routing import Router


class OwnRouter(Router):
    def __init__(self, d_model: int, n_experts: int, *, scale: float = 1.0) -> None:
        super().__init__(d_model, n_experts)
        self.scale = scale
        self.weight = torch.nn.Parameter(torch.zeros(n_experts, d_model))

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * (x.float() @ self.weight.mT)
"""


def test_vocabulary_comes_from_the_data(cli: Any, trained: Any, tmp_path: Path) -> None:
    stored = torch.load(trained.checkpoint)
    assert stored["hyper_parameters"]["vocab_size"] == 256
    save_dir = f"--trainer.logger.init_args.save_dir={tmp_path}"
    outcome = cli("fit", *trained.words, save_dir, "--data.init_args.tokenizer=char")
    assert outcome.code == 0, outcome.err
    [path] = tmp_path.rglob("last.ckpt")
    stored = torch.load(path)
    assert stored["hyper_parameters"]["vocab_size"] == len(stored["tokenizer"]["alphabet"]) == 27
    assert stored["state_dict"]["decoder.embedding.weight"].shape == (27, 16)


def test_configuration_of_a_run_is_kept(trained: Any) -> None:
    kept = yaml.safe_load((trained.folder / "config.yaml").read_text())
    assert kept["model"]["init_args"]["d_model"] == 16
    assert kept["seed_everything"] == 1234
    assert kept["weights_only"] is True


def test_short_names_and_own_classes(
    cli: Any, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_parts.py").write_text(OWN_ROUTER)
    monkeypatch.syspath_prepend(tmp_path)
    words = [
        *trained.words,
        "--model.init_args.attention.init_args.router=LinearRouter",
        "--model.init_args.attention.init_args.router.init_args.init_std=0.5",
        f"{FEED_FORWARD}router=own_parts.OwnRouter",
        f"{FEED_FORWARD}router.init_args.scale=3.0",
        f"{FEED_FORWARD}experts=GLUExperts",
        "--model.init_args.norm=torch.nn.LayerNorm",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
    ]
    try:
        outcome = cli("fit", *words)
        assert outcome.code == 0, outcome.err
        [path] = tmp_path.rglob("last.ckpt")
        block: Any = DSMoELanguageModel.load_from_checkpoint(path).decoder.blocks[0]
        router = block.feed_forward.router
        assert (type(router).__name__, router.scale) == ("OwnRouter", 3.0)
        assert router.weight.abs().sum() > 0  # trained
        assert type(block.feed_forward.experts).__name__ == "GLUExperts"
        assert type(block.attention.router).__name__ == "LinearRouter"
        assert isinstance(block.attention_norm, torch.nn.LayerNorm)
    finally:
        sys.modules.pop("own_parts", None)


def test_resumes_exactly_in_the_middle_of_an_epoch(
    cli: Any, config: Any, tiny: Any, tmp_path: Path
) -> None:
    words = [
        *("-c", config("shakespeare_nano.yaml"), *tiny(tmp_path)),
        "--model.init_args.dropout=0.2",
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=3",
        "--trainer.callbacks=ModelCheckpoint",
        "--trainer.callbacks.every_n_train_steps=2",
        "--trainer.callbacks.save_top_k=-1",
    ]
    straight = cli("fit", *words)
    assert straight.code == 0, straight.err
    first = tmp_path / "shakespeare_nano" / "version_0" / "checkpoints"
    resumed = cli("fit", *words, f"--ckpt_path={first / 'epoch=0-step=2.ckpt'}")
    assert resumed.code == 0, resumed.err
    second = tmp_path / "shakespeare_nano" / "version_1" / "checkpoints"

    assert [path.name for path in second.iterdir()] == ["epoch=0-step=4.ckpt"]
    before = torch.load(first / "epoch=0-step=2.ckpt")
    expected = torch.load(first / "epoch=0-step=4.ckpt")
    found = torch.load(second / "epoch=0-step=4.ckpt")
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, rtol=0, atol=0)
        assert not torch.equal(before["state_dict"][name], value)
    states = found["optimizer_states"], expected["optimizer_states"]
    groups = [group for state in states for part in state for group in part["param_groups"]]
    assert all(group.pop("param_names") for group in groups)
    torch.testing.assert_close(*states, rtol=0, atol=0)
    for part in ("lr_schedulers", "TextDataModule", "global_step", "epoch"):
        assert found[part] == expected[part]


def test_command_line_beats_the_checkpoint(cli: Any, trained: Any, tmp_path: Path) -> None:
    outcome = cli(
        "fit",
        *trained.words,
        f"--trainer.logger.init_args.save_dir={tmp_path}",
        "--trainer.max_steps=3",
        "--model.init_args.expert_mi_weight=0.25",
        f"--ckpt_path={trained.checkpoint}",
    )
    assert outcome.code == 0, outcome.err
    [path] = tmp_path.rglob("last.ckpt")
    assert torch.load(path)["hyper_parameters"]["expert_mi_weight"] == 0.25


@pytest.mark.filterwarnings("ignore:paths in the checkpoint that are no checkpoints of this run")
def test_code_in_a_checkpoint_runs_only_if_trusted(cli: Any, trained: Any, tmp_path: Path) -> None:
    path = tmp_path / "code.ckpt"
    torch.save({**torch.load(trained.checkpoint), "code": Path}, path)
    words = ["test", *trained.words, f"--ckpt_path={path}"]
    assert cli(*words).code == 1
    assert cli(*words, "--weights_only=true").code == 1
    trusting = cli(*words, "--weights_only=false")
    assert trusting.code == 0, trusting.err


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.")  # raised again by `warns`
def test_last_is_the_newest_whole_checkpoint(
    cli: Any, trained: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [*trained.words, f"--trainer.logger.init_args.save_dir={tmp_path}", "--ckpt_path=last"]
    outcome = cli("fit", *words)
    assert outcome.code == 1
    [error] = outcome.errors
    assert f"no complete checkpoint for ckpt_path=last in {tmp_path}/quickstart/version_0" in error
    assert not list(tmp_path.rglob("*.ckpt"))

    folder = tmp_path / "quickstart"
    (folder / "version_1" / "checkpoints").mkdir(parents=True)
    (folder / "version_0").symlink_to(trained.folder)
    damaged = folder / "version_1" / "checkpoints" / "last.ckpt"
    damaged.write_bytes(Path(trained.checkpoint).read_bytes()[:-1])
    with pytest.warns(
        UserWarning, match=r"version_1/checkpoints/last\.ckpt is damaged and skipped"
    ):
        outcome = cli("test", *words)
    assert outcome.code == 0, outcome.err
    assert f"from the checkpoint at {folder}/version_0/checkpoints/last.ckpt" in caplog.text


@pytest.mark.parametrize(
    ("first", "shown"), [(ValueError("the first"), "the first"), (AssertionError(), "Assertion")]
)
def test_the_first_error_is_shown_where_saving_fails_after_it(
    first: Exception,
    shown: str,
    cli: Any,
    config: Any,
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise first

    def save(*_: Any) -> None:
        raise OSError(28, "No space left on device", "last.ckpt")

    monkeypatch.setattr(DSMoELanguageModel, "training_step", fail)
    monkeypatch.setattr("lightning.pytorch.callbacks.ModelCheckpoint.on_exception", save)
    outcome = cli("fit", "-c", config("shakespeare_nano.yaml"), *tiny(tmp_path))
    assert outcome.code == 1
    [error] = outcome.errors
    assert shown in error
    assert "warning: while the run ended: [Errno 28] No space left on device" in outcome.err
