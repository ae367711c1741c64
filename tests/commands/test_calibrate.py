"""The plan that a model loses least with."""

import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import FeedForward
from lightning_dsmoe.inference import load_decoder
from lightning_dsmoe.routing import LinearRouter, SelectionPlan, Threshold, TopK
from lightning_dsmoe.serialization.checkpoint import LoadedDecoder
from lightning_dsmoe.tokenizers import ByteTokenizer

from .conftest import Outcome, Run

pytestmark = pytest.mark.slow

evaluation_setup = import_module("lightning_dsmoe.commands.evaluation_setup")


@pytest.fixture
def words(measuring: Callable[[str, str], list[str]]) -> list[str]:
    return measuring("calibrate", "plan.json")


@pytest.mark.parametrize(("fixed", "budget"), [(False, "0.6"), (True, "60%")])
def test_a_plan_for_a_budget(
    fixed: bool,
    budget: str,
    cli: Callable[..., Outcome],
    words: list[str],
    tmp_path: Path,
    trained: Run,
) -> None:
    outcome = cli(*words, f"--budget={budget}", f"--fixed={str(fixed).lower()}")
    assert outcome.code == 0, outcome.err
    plan = SelectionPlan.load(tmp_path / "plan.json")
    for selections in load_decoder(trained.checkpoint).decoder.selections(plan):
        [kind] = {type(selection) for selection in selections}
        assert kind is TopK or (kind is Threshold and not fixed)
    for words_of_table in ("calibrated", "all experts", "best uniform plan", "standard error"):
        assert words_of_table in outcome.out


def test_a_plan_for_a_loss(cli: Callable[..., Outcome], words: list[str], tmp_path: Path) -> None:
    outcome = cli(*words, "--max-loss-increase=5%")
    assert outcome.code == 0, outcome.err
    plan = SelectionPlan.load(tmp_path / "plan.json")
    assert plan != SelectionPlan()  # a model of two steps needs few experts


def test_a_model_with_experts_of_one_kind_alone(
    cli: Callable[..., Outcome],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router = partial(LinearRouter, init_std=0.5)
    attention = partial(MixtureOfAttentionHeads, n_experts=8, n_heads=1, d_head=4, router=router)
    decoder = Decoder(
        256, 16, 2, attention=attention, feed_forward=partial(FeedForward, d_hidden=16)
    )
    monkeypatch.setattr(
        evaluation_setup,
        "load_decoder",
        lambda path: LoadedDecoder(decoder, ByteTokenizer().to_dict(), 16),
    )
    outcome = cli(*words, "--budget=0.85")
    assert outcome.code == 0, outcome.err
    [rule] = re.findall("Best uniform plan: (.*)\\.", outcome.out)
    assert re.fullmatch("attention: (threshold [0-9.]+|top [0-9])", rule)
    assert (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "calibrate needs either --budget or --max_loss_increase"),
        (["--budget=0.5", "--max_loss_increase=1%"], "calibrate needs either --budget or"),
        (["--budget=0.01"], "a budget of 0.01 cannot be met: one expert in each layer is 0."),
        (["--budget=1.5"], "budget must be a share above 0 and at most 1, got 1.5"),
        (["--budget=150%"], "budget must be a share above 0 and at most 1, got 150%"),
        (["--budget=nan"], "budget must be a share above 0 and at most 1, got nan"),
        (["--budget=2%0"], "budget must be like 0.2 or 20%, got '2%0'"),
        (
            ["--budget=0.5", "--max_tokens=1", "--batch_tokens=16"],
            "in one window, which is too short to find a plan on and to judge it",
        ),
        (["--max_loss_increase=much"], "max_loss_increase must be like 0.5% or 0.005, got 'much'"),
        (["--budget=0.5", "--output=/"], "output must be a file, / is a folder"),
        (["--budget=0.5", "--split=test", "--test_fraction=0"], "needs a test_fraction above 0"),
        (["--budget=0.5", "--max_tokens=0"], "max_tokens must be at least 1, got 0"),
        (["--budget=0.5", "--batch_tokens=-5"], "batch_tokens must be at least 1, got -5"),
        (["--budget=0.5", "--context=0"], "context must be at least 1, got 0"),
        (["--max_loss_increase=-1%"], "max_loss_increase must be from 0 to 1000%, got '-1%'"),
    ],
)
def test_impossible_wishes(
    options: list[str],
    message: str,
    cli: Callable[..., Outcome],
    words: list[str],
    tmp_path: Path,
) -> None:
    outcome = cli(*words, *options)
    assert outcome.code == 1
    [error] = outcome.errors
    assert message in error
    assert not list(tmp_path.iterdir())
