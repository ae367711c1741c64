"""Sparse models from a checkpoint and a plan."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_dsmoe.commands import compile as compile_command
from lightning_dsmoe.inference import compile_sparse, load_decoder, load_sparse
from lightning_dsmoe.routing import SelectionPlan, Threshold, TopK

from .conftest import Outcome, Run

pytestmark = pytest.mark.slow

PLAN = SelectionPlan(experts=Threshold(0.5), attention=TopK(1))


@pytest.fixture
def words(trained: Run, tmp_path: Path) -> list[str]:
    PLAN.save(tmp_path / "plan.json")
    given = {"ckpt_path": trained.checkpoint, "plan": tmp_path / "plan.json"}
    options = [f"--{name}={value}" for name, value in given.items()]
    return ["compile", *options, f"--output={tmp_path / 'new' / 'sparse'}"]


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_it_is_what_compile_sparse_makes(
    quantization: str | None,
    cli: Callable[..., Outcome],
    words: list[str],
    tmp_path: Path,
    trained: Run,
) -> None:
    outcome = cli(*words, *([f"--quantization={quantization}"] if quantization else []))
    assert outcome.code == 0, outcome.err
    model = load_sparse(tmp_path / "new" / "sparse")
    expected = compile_sparse(load_decoder(trained.checkpoint), PLAN, quantization=quantization)
    assert (model.plan, model.quantization) == (PLAN, quantization)
    assert model.tokenizer_description == expected.tokenizer_description is not None
    assert model.context_length == expected.context_length == 16
    tokens = torch.randint(256, (2, 9))
    assert torch.equal(model.logits(tokens), expected.logits(tokens))
    printed = outcome.out.splitlines()
    assert f"{model.report().n_bytes / 2**20:.3g} MiB" in printed[0]
    assert cli(*printed[1].split()[1:], "--max_new_tokens=2").code == 0
    again = cli(*words)  # replaces it
    assert again.code == 0, again.err
    assert load_sparse(tmp_path / "new" / "sparse").quantization is None


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("diary.txt", "exists and is not a sparse model"),
        ("diary.txt/sparse", "cannot be written: "),
        ("locked/sparse", "cannot be written: "),
    ],
)
def test_a_place_is_checked_first(
    place: str,
    message: str,
    words: list[str],
    cli: Callable[..., Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "diary.txt").write_text("dear diary")
    (tmp_path / "locked").mkdir(mode=0o500)
    if place.startswith("locked") and os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("root may write anywhere")

    def read(path: str) -> None:
        raise AssertionError("the checkpoint is not to be read")

    monkeypatch.setattr(compile_command, "load_decoder", read)
    outcome = cli(*words, f"--output={tmp_path / place}")
    assert outcome.code == 1
    [error] = outcome.errors
    assert f"{tmp_path / place} {message}" in error
    assert (tmp_path / "diary.txt").read_text() == "dear diary"


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [
        ("--plan=no.json", 1, "no.json"),
        ("--ckpt_path=no.ckpt", 1, "no.ckpt"),
        ("--quantization=int4", 2, "'int8'"),
    ],
)
def test_mistakes_take_one_line(
    option: str,
    code: int,
    message: str,
    words: list[str],
    cli: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    outcome = cli(*words, option)
    assert outcome.code == code
    [error] = outcome.errors
    assert message in error
    assert not (tmp_path / "new").exists()  # nothing is made before all is read


def test_a_plan_of_another_model(
    words: list[str], cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    SelectionPlan(experts=TopK(99)).save(tmp_path / "plan.json")
    outcome = cli(*words)
    assert outcome.code == 1
    [error] = outcome.errors
    assert "plan.json is not a plan for this model" in error
    assert not (tmp_path / "new" / "sparse").exists()
