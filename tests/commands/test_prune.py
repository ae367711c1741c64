"""Sparse models without the experts that a text never uses."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

from lightning_dsmoe.analysis.unused_experts import Proof
from lightning_dsmoe.inference import Remaining, load_decoder, load_sparse
from lightning_dsmoe.routing import SelectionPlan, TopK
from lightning_dsmoe.serialization.pruning import remaining_experts
from lightning_dsmoe.tokenizers import ByteTokenizer

from .conftest import Outcome, Run

pytestmark = pytest.mark.slow

prune_module = import_module("lightning_dsmoe.commands.prune")


@pytest.fixture
def words(measuring: Callable[[str, str], list[str]], tmp_path: Path) -> list[str]:
    """The routers of a model of two steps hardly differ; the best expert is the same for many."""
    SelectionPlan(experts=TopK(1), attention=TopK(1)).save(tmp_path / "plan.json")
    return [*measuring("prune", "pruned"), f"--plan={tmp_path / 'plan.json'}"]


@pytest.mark.parametrize("quantization", [[], ["--quantization=int8"]])
def test_a_smaller_model_with_the_same_outputs(
    quantization: list[str],
    cli: Callable[..., Outcome],
    words: list[str],
    tmp_path: Path,
    trained: Run,
) -> None:
    outcome = cli(*words, *quantization)
    assert outcome.code == 0, outcome.err
    model = load_sparse(tmp_path / "pruned")
    remaining = remaining_experts(model.decoder)
    assert remaining is not None
    assert model.plan == SelectionPlan.load(tmp_path / "plan.json")
    assert model.quantization == ("int8" if quantization else None)
    decoder = load_decoder(trained.checkpoint).decoder
    for kind, sizes in zip(remaining, decoder.plan_sizes, strict=True):
        for numbers, size in zip(kind, sizes, strict=True):
            removed = 0 if numbers is None else size - len(numbers)
            assert f"{removed} of {size}" in outcome.out
    assert "tokens of the first half: 0 of 512 choices of experts differ" in outcome.out
    assert "Parameters: " in outcome.out
    assert "On the other half the loss is " in outcome.out
    assert f"{model.report().n_bytes / 2**20:.3g} MiB after." in outcome.out
    prompt = torch.from_numpy(ByteTokenizer().encode("def f"))[None]
    written = ByteTokenizer().decode(model.generate(prompt, 8, temperature=0)[0].tolist())
    options = ["--prompt=def f", "--temperature=0", "--max_new_tokens=8"]
    said = cli("generate", f"--artifact={tmp_path / 'pruned'}", *options).out
    assert said == written.rstrip("\N{REPLACEMENT CHARACTER}") + "\n"


def test_its_certificate(
    cli: Callable[..., Outcome], words: list[str], tmp_path: Path, trained: Run
) -> None:
    assert cli(*words).code == 0
    data = [word for word in words if word.startswith(("--files", "--val", "--max", "--batch"))]
    certify = ["certify", f"--artifact={tmp_path / 'pruned'}", f"--ckpt_path={trained.checkpoint}"]
    made = cli(*certify, *data)
    assert made.code == 0, made.err
    assert "left of" in (tmp_path / "pruned" / "README.md").read_text()
    again = cli(*certify, *data)
    assert again.code == 0, again.err
    assert "matches" in again.out


def test_where_all_experts_run(
    cli: Callable[..., Outcome], words: list[str], tmp_path: Path
) -> None:
    SelectionPlan().save(tmp_path / "plan.json")
    outcome = cli(*words)
    assert outcome.code == 0, outcome.err
    assert "All experts run on this text, so none was removed." in outcome.out
    assert "remaining" not in json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert load_sparse(tmp_path / "pruned").plan == SelectionPlan()


def test_plans_of_other_models(
    cli: Callable[..., Outcome], words: list[str], tmp_path: Path
) -> None:
    for plan, message in (
        (
            SelectionPlan(layers={"blocks.2.attention": TopK(1)}),
            "plan: the model has no routed layer 'blocks.2.attention'; the nearest names are",
        ),
        (
            SelectionPlan(experts=TopK(99)),
            "plan, experts, blocks.0.feed_forward: TopK(k=99) needs",
        ),
    ):
        plan.save(tmp_path / "plan.json")
        outcome = cli(*words)
        assert outcome.code == 1
        [error] = outcome.errors
        assert f"plan.json is not a plan for this model: {message}" in error
        assert not (tmp_path / "pruned").exists()


def test_nothing_is_written_without_a_proof(
    cli: Callable[..., Outcome],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prune_module, "prove", lambda *args: Proof(10, 20, 3, 0.25, 4.0))
    outcome = cli(*words)
    assert outcome.code == 1
    [error] = outcome.errors
    assert "without unused experts the outputs differ: 3 of 20 choices of experts differ" in error
    assert not (tmp_path / "pruned").exists()


def test_a_wrong_choice_is_noticed(
    cli: Callable[..., Outcome],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used_experts = prune_module.used_experts

    def others(*args: object) -> Remaining:
        used = used_experts(*args)
        return used._replace(experts=(used.experts[0][1:], used.experts[1]))

    monkeypatch.setattr(prune_module, "used_experts", others)
    outcome = cli(*words)
    assert outcome.code == 1
    assert "without unused experts the outputs differ" in outcome.err
    assert not (tmp_path / "pruned").exists()


def test_what_is_in_the_way_stays(
    cli: Callable[..., Outcome], words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "diary.txt").write_text("dear diary")
    outcome = cli(*words)
    assert outcome.code == 1
    [error] = outcome.errors
    assert "exists and is not a sparse model" in error
    assert (tmp_path / "pruned" / "diary.txt").read_text() == "dear diary"
