"""A page about how a trained model uses its experts."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from lightning_dsmoe import __version__
from lightning_dsmoe.attention import GroupedQueryAttention
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import FeedForward
from lightning_dsmoe.inference import load_decoder
from lightning_dsmoe.routing import SelectionPlan, TopK
from lightning_dsmoe.serialization.architecture import describe_decoder
from lightning_dsmoe.tokenizers import HuggingFaceTokenizer

from .conftest import Outcome, Run

pytestmark = pytest.mark.slow


@pytest.fixture
def words(measuring: Callable[[str, str], list[str]]) -> list[str]:
    return measuring("report", "report.html")


def changed(checkpoint: str, path: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """A copy of a checkpoint with something else in it."""
    state = torch.load(checkpoint, weights_only=True)
    change(state)
    torch.save(state, path)
    return str(path)


def with_decoder(decoder: Decoder) -> Callable[[dict[str, Any]], None]:
    """A change that puts another decoder into a checkpoint."""

    def change(state: dict[str, Any]) -> None:
        state["architecture"] = describe_decoder(decoder)
        state["state_dict"] = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}

    return change


def test_a_page_without_any_option(
    cli: Callable[..., Outcome], words: list[str], tmp_path: Path, trained: Run
) -> None:
    outcome = cli(*words)
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"The report is in {tmp_path / 'report.html'}\n"
    assert "tokens" in outcome.err
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert len(page) < 1_000_000
    for shown in (
        "How last.ckpt uses its experts",
        "experts: threshold 0.1; attention: threshold 0.1 (default)",
        "320 tokens, val split of ",
        f"lightning_dsmoe {__version__}",
        trained.checkpoint,
    ):
        assert shown in page
    assert re.search("SHA-256 [0-9a-f]{16}…", page)
    assert "Difference from the other checkpoint" not in page
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_tokens_keep_the_blank_before_a_word(
    cli: Callable[..., Outcome], words: list[str], tmp_path: Path, trained: Run
) -> None:
    vocabulary = {f"\u2581word{number}": number for number in range(256)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="\u2581word7"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    description = HuggingFaceTokenizer(made.to_str()).to_dict()
    checkpoint = changed(
        trained.checkpoint,
        tmp_path / "words.ckpt",
        lambda state: state.update(tokenizer=description),
    )
    words = [word.replace(trained.checkpoint, checkpoint) for word in words]
    outcome = cli(*words, "--sample=word3 word4")
    assert outcome.code == 0, outcome.err
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ">␣word3<" in page


def test_a_plan_a_sample_and_another_checkpoint(
    cli: Callable[..., Outcome], words: list[str], tmp_path: Path, trained: Run
) -> None:
    name = "a'b<i>.json"
    SelectionPlan(experts=TopK(2), attention=TopK(1)).save(tmp_path / name)

    def half(state: dict[str, Any]) -> None:
        for name, value in state["state_dict"].items():
            if "router" in name:
                value.mul_(0.5)

    other = changed(trained.checkpoint, tmp_path / "<b>other.ckpt", half)
    outcome = cli(
        *words,
        f"--other={other}",
        f"--plan={tmp_path / name}",
        "--sample=<script>alert(1)</script> [x: \u2028]",
    )
    assert outcome.code == 0, outcome.err
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "experts: top 2; attention: top 1 (from " in page
    assert "a&#39;b&lt;i&gt;.json" in page
    assert "&lt;b&gt;other.ckpt" in page
    assert "Difference from the other checkpoint" in page
    assert "6 of 44 experts; feed-forward 0: " in page
    assert page.count('<p class="sample') == 1
    assert page.count("<script>") == 1
    assert "<i>.json" not in page
    assert "<b>other" not in page


def test_a_sample_that_is_not_utf8(
    cli: Callable[..., Outcome], words: list[str], tmp_path: Path
) -> None:
    assert cli(*words, "--sample=x \udcff").code == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = re.findall('title="([^":]*): [0-9]+ of 44 experts', page)
    assert shown[:4] == ["x", "␣", "#239", "#191"]


def test_another_checkpoint_of_something_else(
    cli: Callable[..., Outcome], words: list[str], tmp_path: Path, trained: Run
) -> None:
    decoder = load_decoder(trained.checkpoint).decoder
    decoder.blocks, decoder.n_layers = decoder.blocks[:1], 1
    other = changed(trained.checkpoint, tmp_path / "other.ckpt", with_decoder(decoder))
    outcome = cli(*words, f"--other={other}")
    assert outcome.code == 1
    [error] = outcome.errors
    assert "is of another architecture: n_layers was 2, is 1" in error
    tokenizer = {"kind": "char", "alphabet": "abc"}
    other = changed(
        trained.checkpoint, tmp_path / "other.ckpt", lambda state: state.update(tokenizer=tokenizer)
    )
    [error] = cli(*words, f"--other={other}").errors
    assert "other.ckpt has another tokenizer, so the two cannot be compared" in error
    assert not (tmp_path / "report.html").exists()


def test_a_model_without_mixtures(
    cli: Callable[..., Outcome], words: list[str], tmp_path: Path, trained: Run
) -> None:
    dense = Decoder(
        256,
        16,
        2,
        attention=partial(GroupedQueryAttention, n_heads=2, n_kv_heads=1, d_head=8),
        feed_forward=partial(FeedForward, d_hidden=24),
    )
    checkpoint = changed(trained.checkpoint, tmp_path / "dense.ckpt", with_decoder(dense))
    outcome = cli(*words, f"--ckpt_path={checkpoint}")
    assert outcome.code == 1
    [error] = outcome.errors
    assert error.endswith("this model has no mixture of experts or of attention heads in any layer")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--other=nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
        (["--plan=nowhere.json"], "nowhere.json"),
        (["--sample="], "a sample must be at least one token long"),
        (["--output=."], "output must be a file, . is a folder"),
    ],
)
def test_mistakes(
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


def test_padding_is_no_sample(
    cli: Callable[..., Outcome], words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("abcdefghij" * 20)
    outcome = cli(*words, f"--files={tmp_path / 'short.txt'}", "--val_fraction=0.1")
    assert outcome.code == 0, outcome.err
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = re.findall('title="([^":]*): [0-9]+ of 44 experts', page)
    assert len(shown) == 19  # the last of 20 letters has no successor


def test_a_plan_of_another_model(
    cli: Callable[..., Outcome], words: list[str], tmp_path: Path
) -> None:
    SelectionPlan(layers={"blocks.2.attention": TopK(1)}).save(tmp_path / "plan.json")
    [error] = cli(*words, f"--plan={tmp_path / 'plan.json'}").errors
    expected = (
        "plan.json is not a plan for this model: plan: the model has no routed layer 'blocks.2"
    )
    assert expected in error


def test_an_earlier_page_stays_if_something_goes_wrong(
    cli: Callable[..., Outcome],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cli(*words).code == 0  # which also makes the tokens of the text, if there are none
    (tmp_path / "report.html").write_text("earlier")

    def fails(*args: object, **options: object) -> str:
        raise OSError("no space left")

    monkeypatch.setattr("lightning_dsmoe.files.Path.write_text", fails)
    [error] = cli(*words).errors
    assert "no space left" in error
    assert (tmp_path / "report.html").read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_split_is_checked_before_anything_is_read(
    cli: Callable[..., Outcome], words: list[str]
) -> None:
    outcome = cli(*words, "--split=train")
    assert outcome.code == 2
    assert "split" in outcome.err


@pytest.mark.parametrize("command", ["sweep", "calibrate", "report", "prune"])
def test_help_tells_the_options_of_the_text(cli: Callable[..., Outcome], command: str) -> None:
    shown = " ".join(cli(command, "--help").out.split())
    assert "--max_tokens MAX_TOKENS maximum number of tokens. (type: int, default: 100000)" in shown
    assert "Conditional" not in shown
