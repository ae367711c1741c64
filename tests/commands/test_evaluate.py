"""All experts and plans side by side, on tasks and on text."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_dsmoe import SelectionPlan, TopK
from lightning_dsmoe.analysis.text_models import (
    DecoderText,
    Scorer,
    TransformersText,
    text_loss,
)
from lightning_dsmoe.commands.evaluate import evaluate
from lightning_dsmoe.inference import SparseModel
from lightning_dsmoe.upcycling import save_upcycled, upcycle
from tests.text_models import byte_tokenizer, llama, small_decoder

TEXT = "To be, or not to be, that is the question. " * 4


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


@pytest.fixture
def plan(tmp_path: Path) -> str:
    SelectionPlan(experts=TopK(1)).save(tmp_path / "sparse.json")
    return str(tmp_path / "sparse.json")


@pytest.fixture
def artifact(tmp_path: Path) -> str:
    model = small_decoder().model
    model.plan = SelectionPlan(experts=TopK(2))
    model.save(tmp_path / "model")
    return str(tmp_path / "model")


def test_text_under_plans(
    artifact: str, text: str, plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    evaluate(artifact=artifact, text=text, plans=plan, output=str(output), device="cpu")
    shown = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert list(found["plans"]) == ["all experts", "its plan", "sparse"]
    model = SparseModel.load(artifact)
    for name, each in found["plans"].items():
        scorer = Scorer(DecoderText(model), SelectionPlan.from_dict(each["plan"]))
        loss = text_loss(scorer, TEXT)
        assert each["text"]["bits_per_byte"] == pytest.approx(loss.bits_per_byte)
        assert each["text"]["active_share"]["mean"] == pytest.approx(scorer.active_share.mean)
        assert f"{loss.nats_per_token:.3f}" in shown, name
    shares = [each["text"]["active_share"]["mean"] for each in found["plans"].values()]
    assert 1 == shares[0] > shares[1] > shares[2]
    assert "sparse: experts: top 1; attention: all." in shown
    evaluate(artifact=artifact, text=text, limit=10, output=str(output), device="cpu")
    assert json.loads(output.read_text())["plans"]["its plan"]["text"]["n_bytes"] == 10


def test_a_directory_of_transformers(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = llama(routed=False)
    plain.model.save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    capsys.readouterr()
    evaluate(from_=str(tmp_path / "llama"), text=text, device="cpu")
    shown = capsys.readouterr().out
    loss = text_loss(Scorer(plain), TEXT)
    assert f"{loss.bits_per_byte:.3f}" in shown
    assert "unknown" in shown  # how much of it runs
    assert "loss vs" not in shown  # of itself


def test_an_upcycled_directory(text: str, plan: str, tmp_path: Path) -> None:
    model = llama(routed=False).model
    upcycle(model, 4, router="activations", tokens=torch.randint(256, (4, 16)))
    save_upcycled(model, tmp_path / "upcycled")
    byte_tokenizer().save_pretrained(tmp_path / "upcycled")
    output = tmp_path / "results.json"
    evaluate(
        from_=str(tmp_path / "upcycled"), text=text, plans=plan, output=str(output), device="cpu"
    )
    found = json.loads(output.read_text())["plans"]
    for each in found.values():
        scorer = Scorer(
            TransformersText(model, byte_tokenizer()), SelectionPlan.from_dict(each["plan"])
        )
        assert each["text"]["nats"] == pytest.approx(text_loss(scorer, TEXT).nats, rel=1e-5)
        assert each["text"]["active_share"]["mean"] == pytest.approx(scorer.active_share.mean)
    assert found["all experts"]["text"]["active_share"]["mean"] == 1
    assert found["sparse"]["text"]["active_share"]["mean"] < 0.8


def test_no_pickle_is_read(text: str, tmp_path: Path) -> None:
    model = llama(routed=False).model
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="transformers cannot load"):
        evaluate(from_=str(tmp_path), text=text)


def without_a_tensor(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def with_another_shape(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def half_a_file(path: Path) -> None:
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def no_heads(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))


def no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_a_tensor, r"1 weights are in no file, such as model\.layers\.1\.mlp\.up_proj"),
        (with_another_shape, "cannot load"),
        (half_a_file, "cannot load"),
        (no_heads, "cannot load"),
        (no_tokenizer, "cannot load"),
    ],
)
def test_spoilt_directories(
    spoil: Callable[[Path], None], message: str, text: str, tmp_path: Path
) -> None:
    path = tmp_path / "llama"
    llama(routed=False).model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    spoil(path)
    with pytest.raises(ValueError, match=message):
        evaluate(from_=str(path), text=text, device="cpu")


def test_brackets_in_names_are_no_markup(
    artifact: str, plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "t[bold].txt"
    text.write_text(TEXT)
    odd = Path(plan).rename(tmp_path / "p[x][red].json")
    evaluate(artifact=artifact, text=str(text), plans=str(odd), device="cpu")
    shown = capsys.readouterr().out
    assert "p[x][red]" in shown
    assert "t[bold].txt, active" in shown


def test_what_is_compared(
    artifact: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = text_loss(Scorer(DecoderText(SparseModel.load(artifact))), TEXT, context=8)
    output = tmp_path / "results.json"
    evaluate(artifact=artifact, text=text, context=8, output=str(output), device="cpu")
    found = json.loads(output.read_text())
    assert found["context"] == 8
    assert found["plans"]["all experts"]["text"]["nats"] == pytest.approx(loss.nats)
    assert "loss vs all experts" in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": None}, "evaluate needs --tasks or --text"),
        ({"artifact": None}, "exactly one of --ckpt_path, --artifact and --from"),
        ({"from_": "x"}, "exactly one of --ckpt_path, --artifact and --from"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"prefix_token": 256}, "prefix_token must be from 0 to 255, got 256"),
        ({"context": 0}, "context must be from 1 to 24, got 0"),
        ({"context": 25}, "context must be from 1 to 24, got 25"),
        ({"device": "tpu"}, "device must be cpu or a CUDA GPU"),
        ({"output": "/"}, "output must be a file, / is a folder"),
        ({"artifact": None, "from_": "/none"}, "/none is no directory of a model"),
        ({"text": "/none"}, "there is no text /none"),
    ],
)
def test_impossible_wishes(
    options: dict[str, object], message: str, artifact: str, text: str
) -> None:
    words: dict[str, object] = {"artifact": artifact, "text": text, "device": "cpu", **options}
    with pytest.raises(ValueError, match=message):
        evaluate(**words)  # type: ignore[arg-type]


def test_all_files_that_are_no_plans_are_named(artifact: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    SelectionPlan(experts=TopK(9)).save(tmp_path / "b.json")
    plans = [str(tmp_path / f"{name}.json") for name in ("a", "b", "c")]
    with pytest.raises(ValueError, match=r"a\.json is not .*b\.json is not .*c\.json is not "):
        evaluate(artifact=artifact, text=text, plans=plans)


@pytest.mark.skipif(bool(importlib.util.find_spec("lm_eval")), reason="the eval extra is there")
def test_tasks_without_the_harness(artifact: str) -> None:
    with pytest.raises(ImportError, match=re.escape("pip install 'lightning-dsmoe[eval]'")):
        evaluate(artifact=artifact, tasks="arc_easy")
