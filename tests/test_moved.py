"""Names that a user of version 0.1 may have typed, or that stand in files of it."""

import importlib
import pickle
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_dsmoe.moved import MOVED
from lightning_dsmoe.serialization.class_paths import check_hyperparameters, named_object
from lightning_dsmoe.serialization.pruning import Remaining
from lightning_dsmoe.training.language_model import DSMoELanguageModel

OLD_MODEL = "lightning_dsmoe.language_model.DSMoELanguageModel"
OLD_REMAINING = "lightning_dsmoe.inference.pruning.Remaining"


@pytest.fixture(autouse=True)
def not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for old in MOVED:
        monkeypatch.delitem(sys.modules, f"lightning_dsmoe.{old}", raising=False)


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_module_name_leads_to_the_same_objects(old: str, new: str) -> None:
    message = f"lightning_dsmoe.{old} is now lightning_dsmoe.{new}; the old name goes with"
    with pytest.warns(DeprecationWarning, match=message):
        found = importlib.import_module(f"lightning_dsmoe.{old}")
    expected = importlib.import_module(f"lightning_dsmoe.{new}")
    own = [name for name, value in vars(expected).items() if not name.startswith("__")]
    assert own
    assert all(getattr(found, name) is getattr(expected, name) for name in own)


@pytest.mark.parametrize(
    "line",
    [
        "from lightning_dsmoe.language_model import DSMoELanguageModel",
        "import lightning_dsmoe.inference.pruning as pruning",
        "from lightning_dsmoe.inference import pruning",
    ],
)
def test_the_warning_points_at_the_line_of_the_user(line: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import sys\n\n{line}\n")
    importlib.import_module("lightning_dsmoe.inference").__dict__.pop("pruning", None)
    with pytest.warns(DeprecationWarning, match="the old name goes") as caught:
        exec(compile(script.read_text(), str(script), "exec"), {})
    assert [(each.filename, each.lineno) for each in caught] == [(str(script), 3)]


def test_an_old_path_in_a_file_leads_to_the_class_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert named_object(OLD_MODEL) is DSMoELanguageModel
        assert named_object(OLD_REMAINING) is Remaining
        check_hyperparameters({"_class_path": OLD_MODEL}, DSMoELanguageModel)
    assert "lightning_dsmoe.language_model" not in sys.modules


def test_an_old_path_in_a_configuration_is_read_with_a_warning() -> None:
    parts: dict[str, Any] = {
        "attention": {"class_path": "GroupedQueryAttention", "init_args": {"n_heads": 1}},
        "feed_forward": {"class_path": "FeedForward", "init_args": {"d_hidden": 4}},
    }
    parts["attention"]["init_args"] |= {"n_kv_heads": 1, "d_head": 4}
    options = {"vocab_size": 3, "d_model": 4, "n_layers": 1, **parts}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DSMoELanguageModel, "model")
    with pytest.warns(DeprecationWarning, match="is now lightning_dsmoe.training.language_model"):
        found = parser.parse_object({"model": {"class_path": OLD_MODEL, "init_args": options}})
    assert found.model.class_path.endswith(".DSMoELanguageModel")


def test_an_old_pickle_is_read_with_a_warning() -> None:
    remaining = Remaining(((0,),), (None,))
    old = pickle.dumps(remaining, protocol=0).replace(
        b"lightning_dsmoe.serialization.pruning", b"lightning_dsmoe.inference.pruning"
    )
    assert b"inference.pruning" in old
    with pytest.warns(DeprecationWarning, match="is now lightning_dsmoe.serialization.pruning"):
        assert pickle.loads(old) == remaining


@pytest.mark.parametrize("old", MOVED)
def test_no_old_module_name_hides_a_public_name(old: str) -> None:
    room, _, name = f"lightning_dsmoe.{old}".rpartition(".")
    named = getattr(importlib.import_module(room), name, None)
    assert named is None or isinstance(named, ModuleType)  # one that was imported before
