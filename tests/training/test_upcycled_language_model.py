"""Upcycled models of transformers, from the command line and by both trainers."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning import Callback, Trainer
from torch import Tensor
from torch.nn import functional as F

from lightning_dsmoe import (
    RoutingLoss,
    SelectionPlan,
    TextDataModule,
    TopK,
    UpcycledLanguageModel,
    cli,
    compile_sparse,
    load_sparse,
    record_routings,
    routed_layers,
    run_plan,
)
from lightning_dsmoe.analysis import calibrate, sweep
from lightning_dsmoe.inference import SwitchPoints
from lightning_dsmoe.schedules import LinearWarmupCosine
from lightning_dsmoe.upcycling import load_upcycled

UNCOMPILED = SwitchPoints(gather_up_to=0)  # a kernel for few tokens takes a minute to compile

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama over bytes, with its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("dense")
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"kind": "byte"}')
    (folder / "text.txt").write_text("what the model reads\n" * 400)
    return folder


def run(*words: str) -> None:
    cli.main([*words])


def test_upcycled_and_trained_from_the_command_line(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-dsmoe"])
    up, trained = tmp_path / "up", tmp_path / "trained"
    text = str(dense / "text.txt")
    options = ("--split=activations", "--router=activations", f"--text={text}")
    run("upcycle", "--from", str(dense), "--n_experts=6", f"--output={up}", *options)
    assert "2 mixtures of 6 experts of 7 neurons" in capsys.readouterr().out
    root = Path(cli.__file__).parent / "cli_configs"
    words = [
        "fit",
        f"-c={root / 'upcycle.yaml'}",
        f"--model.init_args.directory={up}",
        f"--model.init_args.output={trained}",
        f"--data.init_args.files={text}",
        f"--data.init_args.cache_dir={tmp_path}",
        "--data.init_args.context=16",
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={tmp_path}",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
    ]
    run(*words)
    model, before = load_upcycled(trained), load_upcycled(up)
    for name, layer in routed_layers(model).items():
        old: Any = routed_layers(before)[name]
        assert not torch.equal(layer.router.weight, old.router.weight)  # type: ignore[arg-type]
    [metrics] = tmp_path.rglob("metrics.csv")
    header = metrics.read_text().partition("\n")[0]
    assert "val/loss" in header
    assert "train/experts/mutual_information" in header


@pytest.fixture(scope="module")
def routed(dense: Path) -> Any:
    """An upcycled Llama whose routers prefer some experts."""
    model = UpcycledLanguageModel(str(dense), 4).model.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in routed_layers(model).values():
            layer.router.weight.normal_(std=3.0, generator=generator)  # type: ignore[union-attr,operator]
            layer.experts.w_out.weight.mul_(10)  # or the choice of experts is hardly seen in logits
    return model


def losses(model: Any, tokens_BT: Tensor) -> Tensor:
    logits_BTV = model(tokens_BT).logits[:, :-1]
    return F.cross_entropy(logits_BTV.mT, tokens_BT[:, 1:], reduction="none").mean(1)


@torch.no_grad()
def test_plans_run_in_all_tools(routed: Any, tmp_path: Path) -> None:
    """compile_sparse, saved and loaded, generate, sweep and calibrate, beside an open plan."""
    plan, tokens = SelectionPlan(experts=TopK(2)), torch.tensor([[*b"what the"], [*b"model re"]])
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    every = routed(tokens).logits
    with run_plan(routed, plan):
        expected, text = routed(tokens).logits, routed.generate(tokens, **greedy)
    assert float((expected - every).abs().max()) > 1e-4
    sparse = compile_sparse(routed, plan, switch_points=UNCOMPILED)
    sparse.save(tmp_path / "sparse")
    loaded = load_sparse(tmp_path / "sparse", model=routed)
    loaded.switch_points = UNCOMPILED
    for each in (sparse, loaded):
        torch.testing.assert_close(each(tokens).logits, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(each.model.generate(tokens, **greedy), text)

    batches = [torch.randint(256, (4, 12)) for _ in range(4)]
    results = sweep(routed, batches, losses)
    mean = float(torch.cat([losses(routed, batch) for batch in batches]).mean())
    assert results["all"].loss == pytest.approx(mean, rel=1e-5)
    with run_plan(routed, SelectionPlan(experts=TopK(1))):
        top1 = float(torch.cat([losses(routed, batch) for batch in batches]).mean())
    assert results["top 1 and 1"].loss == pytest.approx(top1, rel=1e-5)
    whole, idle = 4764, 3 * 24 * 30  # parameters of a layer, with half the last norm
    assert results["top 1 and 1"].active_share_mean == pytest.approx(1 - idle / whole)
    found = calibrate(routed, batches, losses, budget=0.6, fixed=True)
    assert found.result.active_share_mean <= 0.6


class SaveAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(model: UpcycledLanguageModel, dense: Path, *callbacks: Callback, **options: Any) -> None:
    data = TextDataModule(
        str(dense / "text.txt"), context=16, batch_size=4, cache_dir=str(dense / "cache")
    )
    trainer = Trainer(
        max_steps=6,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=2,
        callbacks=list(callbacks),
    )
    trainer.fit(model, data, **options)


def scheduled(dense: Path) -> UpcycledLanguageModel:
    schedule: Any = partial(LinearWarmupCosine, max_steps=6, warmup_steps=2)
    return UpcycledLanguageModel(str(dense), 4, lr_scheduler=schedule)


def with_dropout(dense: Path, folder: Path) -> Path:
    """The same with dropout of the attention, so that training draws random numbers."""
    folder.mkdir()
    for each in dense.iterdir():
        if each.is_file():
            (folder / each.name).write_bytes(each.read_bytes())
    config = json.loads((dense / "config.json").read_text()) | {"attention_dropout": 0.2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_interrupted_run_ends_bitwise_alike(dense: Path, tmp_path: Path) -> None:
    source, path = with_dropout(dense, tmp_path / "source"), tmp_path / "middle.ckpt"
    whole, resumed = scheduled(source), scheduled(source)
    fit(whole, source, SaveAt(3, path))
    torch.manual_seed(7)
    fit(resumed, source, ckpt_path=str(path), weights_only=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_checkpoint_is_read_without_running_what_it_names(dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    model = scheduled(dense)
    fit(model, dense, SaveAt(6, path))
    loaded = UpcycledLanguageModel.load_from_checkpoint(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"] |= {
        "trust_remote_code": True,
        "_instantiator": "os.system",
        "n_experts": 5,
    }
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="weights are another model's"):
        UpcycledLanguageModel.load_from_checkpoint(path)
    loaded = UpcycledLanguageModel.load_from_checkpoint(path, n_experts=4)
    assert not loaded.hparams["trust_remote_code"]
    del checkpoint["hyper_parameters"]["directory"]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="no checkpoint of a UpcycledLanguageModel"):
        UpcycledLanguageModel.load_from_checkpoint(path)


def test_weights_are_trained_in_float32(dense: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    upcycled = UpcycledLanguageModel(str(tmp_path / "half"), 4)
    assert {parameter.dtype for parameter in upcycled.parameters()} == {torch.float32}
    upcycled.save(tmp_path / "up")
    assert load_upcycled(tmp_path / "up").dtype == torch.float32


def test_text_of_another_tokenizer_is_refused(dense: Path, tmp_path: Path) -> None:
    source = with_dropout(dense, tmp_path / "source")
    (source / "tokenizer.json").write_text('{"kind": "char", "alphabet": "abc"}')
    with pytest.raises(ValueError, match=r"not that of the model: use tokenizer='.*json'"):
        fit(scheduled(source), dense)


def test_sharding_is_refused(dense: Path) -> None:
    model = scheduled(dense)
    model._device_mesh = object()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="cannot be sharded"):
        model.configure_model()


def test_what_does_not_fit_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n_experts is for a dense model"):
        UpcycledLanguageModel(str(dense))
    with pytest.raises(ValueError, match=r"has 300 tokens, the model .* only 256"):
        UpcycledLanguageModel(str(dense), 4, vocab_size=300)
    with pytest.raises(FileExistsError, match="no upcycled model"):
        UpcycledLanguageModel(str(dense), 4, output=str(dense))


class MixtureTrainer(transformers.Trainer):  # type: ignore[misc]
    routing_loss = RoutingLoss(expert_mi=0.02)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        with record_routings(model) as record:
            loss = super().compute_loss(model, inputs)
        return loss + self.routing_loss(record)


def test_trained_by_transformers(dense: Path, tmp_path: Path) -> None:
    model = UpcycledLanguageModel(str(dense), 4).model
    before = model.model.layers[0].mlp.layer.experts.w_in.weight.detach().clone()
    row = {"input_ids": [*b"what the model reads"], "labels": [*b"what the model reads"]}
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, report_to="none", save_strategy="no", use_cpu=True
    )
    result = MixtureTrainer(model, arguments, train_dataset=[row] * 24).train()
    assert math.isfinite(result.training_loss)
    assert not torch.equal(model.model.layers[0].mlp.layer.experts.w_in.weight, before)
