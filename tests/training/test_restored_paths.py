"""What a resumed checkpoint says of files elsewhere is not acted on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_dsmoe.training.language_model import DSMoELanguageModel
from lightning_dsmoe.training.restored_paths import drop_foreign_paths

Fit = Callable[..., ModelCheckpoint]
Drop = Callable[..., dict[str, Any]]
NAMES = ("best_model_path", "kth_best_model_path", "last_model_path")
WARNING = "no checkpoints of this run are not taken over: .*thesis"


@pytest.fixture
def thesis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in a folder that is named like a checkpoint, and ways that lead there."""
    (tmp_path / "thesis.ckpt").mkdir()
    chapter = tmp_path / "thesis.ckpt" / "chapter.txt"
    chapter.write_text("years of work")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path)
    (tmp_path / "run" / "thesis.ckpt").symlink_to(tmp_path / "thesis.ckpt")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return chapter


@pytest.fixture
def drop(make_trainer: Callable[..., Trainer]) -> Drop:
    def state_of(
        path: object, *, dirpath: str = "run", resumed: str = "run/last.ckpt"
    ) -> dict[str, Any]:
        """What is left of a state that names a path everywhere."""
        callback = ModelCheckpoint(dirpath)
        trainer = make_trainer(callbacks=[callback], enable_checkpointing=True)
        trainer.ckpt_path = resumed
        state = {**dict.fromkeys(NAMES, path), "best_k_models": {path: 1.0}, "kth_value": 2.0}
        checkpoint = {"callbacks": {callback.state_key: state, "Other": {"path": path}}}
        drop_foreign_paths(checkpoint, trainer)
        assert checkpoint["callbacks"]["Other"] == {"path": path}
        return checkpoint["callbacks"][callback.state_key]

    return state_of


@pytest.mark.parametrize("dirpath", ["run", "."])
@pytest.mark.parametrize(
    "path",
    [
        "local://{}/thesis.ckpt",
        "local:{}/thesis.ckpt",
        "file:{}/thesis.ckpt",
        "file:///{}/run/thesis.ckpt",
        "{}/run/../thesis.ckpt",
        "{}/run/link/thesis.ckpt",
        "{}/run/thesis.ckpt",
        "simplecache::local://{}/thesis.ckpt",
        "https://thesis.example/best.ckpt",
        "~/thesis.ckpt",
        "thesis.ckpt",
        "run/thesis.txt",
        "run/thesis\0.ckpt",
        ("thesis.ckpt",),
    ],
)
def test_paths_elsewhere_are_dropped(
    path: Any, dirpath: str, drop: Drop, thesis: Path, tmp_path: Path
) -> None:
    path = path.format(tmp_path) if isinstance(path, str) else path
    with pytest.warns(UserWarning, match=WARNING):
        state = drop(path, dirpath=dirpath)
    assert state == {**dict.fromkeys(NAMES, ""), "best_k_models": {}, "kth_value": 2.0}


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("run/epoch=0-step=1.ckpt", {}),
        ("run/../run/best.ckpt", {}),
        ("{}/run/epoch=0/loss=1.ckpt", {}),
        ("earlier/best.ckpt", {"resumed": "{}/earlier/last.ckpt"}),
        ("best.ckpt", {"resumed": "last.ckpt"}),
        ("~/run/best.ckpt", {}),
        ("s3://bucket/run/best.ckpt", {"resumed": "s3://bucket/run/last.ckpt"}),
    ],
)
def test_own_checkpoints_stay(
    path: str, options: dict[str, str], drop: Drop, thesis: Path, tmp_path: Path
) -> None:
    path = path.format(tmp_path)
    state = drop(path, **{name: value.format(tmp_path) for name, value in options.items()})
    assert state == {**dict.fromkeys(NAMES, path), "best_k_models": {path: 1.0}, "kth_value": 2.0}


def test_folders_are_checkpoints_where_the_resumed_one_is(drop: Drop, tmp_path: Path) -> None:
    for name in ("last.ckpt", "thesis.ckpt"):
        (tmp_path / name).mkdir()
    folder, path = str(tmp_path), str(tmp_path / "thesis.ckpt")
    assert drop(path, dirpath=folder, resumed=f"{folder}/last.ckpt")["last_model_path"] == path
    with pytest.warns(UserWarning, match=WARNING):
        drop(path, dirpath=folder, resumed=f"{folder}/other.ckpt")
    remote = "s3://bucket/run/../thesis.ckpt"
    with pytest.warns(UserWarning, match=WARNING):
        drop(remote, resumed="s3://bucket/run/last.ckpt")


def test_many_paths_are_one_short_warning(drop: Drop, make_trainer: Callable[..., Trainer]) -> None:
    callback = ModelCheckpoint("run")
    trainer = make_trainer(callbacks=[callback], enable_checkpointing=True)
    best = {f"/{i}/thesis{'x' * 10_000}": 1.0 for i in range(1000)}
    with pytest.warns(UserWarning, match=f"{WARNING}.* and 990 more") as warned:
        drop_foreign_paths({"callbacks": {callback.state_key: {"best_k_models": best}}}, trainer)
    assert len(str(warned[0].message)) < 3000
    for other in ({}, {"callbacks": None}, {"callbacks": {callback.state_key: [best]}}):
        drop_foreign_paths(other, trainer)


@pytest.fixture
def fit(
    make_one_model: Callable[..., DSMoELanguageModel],
    make_loader: Callable[..., DataLoader[Any]],
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> Fit:
    def run(steps: int, ckpt_path: Path | None = None) -> ModelCheckpoint:
        """Train with a checkpoint after every step."""
        callback = ModelCheckpoint(tmp_path / "run", every_n_train_steps=1, save_last=True)
        trainer = make_trainer(
            max_steps=steps, logger=False, callbacks=[callback], enable_checkpointing=True
        )
        trainer.fit(make_one_model(), make_loader(3), make_loader(3), ckpt_path=ckpt_path)
        return callback

    return run


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.")  # raised again by `warns`
def test_resuming_deletes_its_own_checkpoints_only(fit: Fit, thesis: Path, tmp_path: Path) -> None:
    fit(1)
    last = tmp_path / "run" / "last.ckpt"
    checkpoint = torch.load(last)
    fit(2, last)
    (tmp_path / "run" / "link").unlink()
    (tmp_path / "run" / "thesis.ckpt").unlink()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"epoch=1-step=2.ckpt", "last.ckpt"}  # that of the first step is replaced

    [state] = checkpoint["callbacks"].values()
    state["best_model_path"] = f"local://{thesis.parent}"
    state["last_model_path"] = f"{tmp_path}/run/../thesis.ckpt"
    del state["dirpath"]
    torch.save(checkpoint, tmp_path / "forged.ckpt")
    with pytest.warns(UserWarning, match=WARNING):
        callback = fit(3, tmp_path / "forged.ckpt")
    assert thesis.read_text() == "years of work"
    assert "thesis" not in str(callback.state_dict())
