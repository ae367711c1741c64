from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from lightning_dsmoe import DSMoELanguageModel, SelectionPlan
from lightning_dsmoe.commands.generate import generate
from lightning_dsmoe.commands.import_ import import_
from lightning_dsmoe.commands.report import report
from lightning_dsmoe.commands.sweep import sweep
from lightning_dsmoe.hugging_face import import_hf, plan_of
from lightning_dsmoe.inference import compile_sparse, load_decoder

from ..small_models import save_model

OPTIONS: dict[str, dict[str, Any]] = {
    "Qwen2Moe": {"mlp_only_layers": [1]},
    "JetMoe": {},
    "Qwen3": {
        "rope_parameters": {
            "rope_theta": 1e4,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "GPT2": {},
}


def save_tokenizer(folder: Path, n_tokens: int) -> None:
    letters = {chr(number): number - 64 for number in range(64, 64 + n_tokens)}
    model = tokenizers.models.BPE(letters, [], unk_token="@", fuse_unk=False)
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))


def n_experts_of(name: str) -> int | None:
    return 4 if name in ("Qwen3", "GPT2") else None


@pytest.mark.parametrize("name", OPTIONS)
def test_a_checkpoint_holds_the_model(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path, name, **OPTIONS[name])
    save_tokenizer(tmp_path, 61)
    import_(str(tmp_path), str(tmp_path / "x.ckpt"), n_experts_of(name))
    plan = SelectionPlan.load(tmp_path / "x.plan.json")
    assert plan == plan_of(tmp_path)
    loaded = load_decoder(tmp_path / "x.ckpt")
    assert loaded.context == 128
    assert loaded.tokenizer is not None
    tokens = torch.randint(61, (2, 20))
    with torch.no_grad():
        theirs = model(tokens).logits
        trainable = DSMoELanguageModel.load_from_checkpoint(tmp_path / "x.ckpt").eval()
        for ours in (
            loaded.decoder(tokens, plan).logits,
            trainable(tokens, plan).logits,
            compile_sparse(tmp_path / "x.ckpt", plan).logits(tokens),
        ):
            assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def test_neurons_are_split_by_the_activations_of_a_text(tmp_path: Path) -> None:
    model = save_model(tmp_path, "GPT2")
    (tmp_path / "text").write_text("HELLO@WORLD@" * 50)
    arguments: Any = (str(tmp_path), str(tmp_path / "x.ckpt"), 4)
    with pytest.raises(ValueError, match=r"text=.* needs a tokenizer.json"):
        import_(*arguments, split="activations", text=str(tmp_path / "text"))
    save_tokenizer(tmp_path, 61)
    with pytest.raises(ValueError, match="needs the tokens of a sample text"):
        import_(*arguments, split="activations")
    with pytest.raises(ValueError, match="nothing else does"):
        import_(*arguments, text=str(tmp_path / "text"))
    with pytest.raises(FileNotFoundError):
        import_(*arguments, split="activations", text=str(tmp_path / "none"))
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty holds no text"):
        import_(*arguments, split="activations", text=str(tmp_path / "empty"))
    assert not (tmp_path / "x.ckpt").exists()
    import_(*arguments, split="activations", text=str(tmp_path / "text"))
    decoder = load_decoder(tmp_path / "x.ckpt").decoder
    plain = import_hf(tmp_path, n_experts=4)
    first, before = (d.blocks[0].feed_forward.experts.w_out.weight for d in (decoder, plain))
    assert not torch.equal(first, before)
    tokens = torch.randint(61, (2, 20))
    with torch.no_grad():
        theirs = model(tokens).logits
        ours = decoder(tokens).logits
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def test_the_tools_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path, "JetMoe")
    save_tokenizer(tmp_path, 61)
    import_(".", "x.ckpt")
    text = tmp_path / "text.txt"
    text.write_text("HELLO@WORLD@" * 200)
    options: dict[str, Any] = {"files": str(text), "max_tokens": 256, "context": 32}
    sweep("x.ckpt", "sweep", **options)
    report("x.ckpt", output="report.html", plan="x.plan.json", **options)
    generate("x.ckpt", prompt="HELLO", max_new_tokens=4, plan="x.plan.json")
    assert (tmp_path / "sweep" / "knee.json").is_file()
    assert (tmp_path / "report.html").is_file()


def fit(
    model: DSMoELanguageModel, folder: Path, ckpt_path: Path | None = None, **options: Any
) -> Trainer:
    windows = torch.randint(61, (8, 17))
    batches = [{"input_ids": row[:-1], "labels": row[1:]} for row in windows]
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    loader: Any = DataLoader(batches, batch_size=4)  # type: ignore[arg-type]
    trainer.fit(model, loader, loader, ckpt_path=ckpt_path)
    return trainer


def test_dense_training_continues_from_it(tmp_path: Path) -> None:
    save_model(tmp_path, "Qwen2Moe")
    import_(str(tmp_path), str(tmp_path / "x.ckpt"))
    model = DSMoELanguageModel.load_from_checkpoint(tmp_path / "x.ckpt")
    before = model.decoder.blocks[0].feed_forward.router.weight.clone()
    trainer = fit(model, tmp_path)
    assert not torch.equal(model.decoder.blocks[0].feed_forward.router.weight, before)
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    trained = load_decoder(tmp_path / "trained.ckpt").decoder
    tokens = torch.randint(61, (1, 9))
    assert torch.equal(trained(tokens).logits, model.eval()(tokens).logits)


def test_a_run_resumes_from_it_with_a_new_optimizer(tmp_path: Path) -> None:
    save_model(tmp_path, "JetMoe")
    import_(str(tmp_path), str(tmp_path / "x.ckpt"))
    imported = load_decoder(tmp_path / "x.ckpt").decoder
    model = DSMoELanguageModel.load_from_checkpoint(tmp_path / "x.ckpt")
    with torch.no_grad():
        model.decoder.norm.weight.zero_()
    trained = fit(model, tmp_path, ckpt_path=tmp_path / "x.ckpt", limit_train_batches=0)
    assert trained.global_step == 0
    assert torch.equal(model.decoder.norm.weight, imported.norm.weight)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    save_model(tmp_path, "Mixtral")
    save_tokenizer(tmp_path, 62)
    with pytest.raises(ValueError, match="has 62 tokens, the model only 61: it belongs to another"):
        import_(str(tmp_path), str(tmp_path / "x.ckpt"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizers JSON"):
        import_(str(tmp_path), str(tmp_path / "x.ckpt"))
    assert not (tmp_path / "x.ckpt").exists()


def test_a_model_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path, "Mixtral", max_position_embeddings=10**6)
    import_(str(tmp_path), str(tmp_path / "x.ckpt"))
    assert "no tokenizer.json" in capsys.readouterr().out
    assert load_decoder(tmp_path / "x.ckpt").context == 4096


def test_nothing_is_written_of_what_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "Llama")
    with pytest.raises(ValueError, match="n_experts must divide"):
        import_(str(tmp_path), str(tmp_path / "x.ckpt"), 5)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        import_(str(tmp_path), str(tmp_path / "x.ckpt"), 4)
    with pytest.raises(ValueError, match="output must be a file"):
        import_(str(tmp_path), str(tmp_path), 4)
    assert not list(tmp_path.glob("*x.*ckpt*"))
