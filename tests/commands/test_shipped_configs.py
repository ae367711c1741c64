"""Every shipped configuration: trained, tested, reloaded, and printed."""

from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
import yaml
from lightning import LightningDataModule

from lightning_dsmoe import DSMoELanguageModel
from lightning_dsmoe.commands.train import TrainingParser
from lightning_dsmoe.inference import load_decoder, load_sparse
from lightning_dsmoe.metrics import count_parameters

pytestmark = pytest.mark.slow

NANO, LONG = "shakespeare_nano.yaml", "shakespeare_long.yaml"
FRAGMENTS = [
    "callbacks/annealing.yaml",
    "callbacks/sparse_compile.yaml",
    "callbacks/sparse_evaluation.yaml",
    "callbacks/throughput.yaml",
    "callbacks/utilization.yaml",
    "optimizers/muon.yaml",
]
CLOSED_LOOP = ["callbacks/sparsity_target.yaml", "callbacks/sparse_finishing.yaml"]
SCALES = ["scale/ddp.yaml", "scale/fsdp2.yaml", "scale/slurm.yaml"]
RECIPES = [
    ["quickstart.yaml"],
    [NANO],
    [NANO, LONG],
    [NANO, "baselines/dense.yaml"],
    ["quickstart.yaml", "baselines/dense.yaml"],
    [NANO, "baselines/smoe.yaml"],
]
PAPER = {
    "paper/dsmoe_1b.yaml": 1067e6,
    "paper/dsmoe_3b.yaml": 2846e6,
    "paper/dsmoe_6b.yaml": 6343e6,
}


def overlays(config: Any, names: list[str]) -> list[str]:
    return [word for name in names for word in ("-c", config(name))]


def test_no_configuration_is_forgotten(config: Any) -> None:
    root = Path(config("quickstart.yaml")).parent
    shipped = {str(path.relative_to(root)) for path in root.rglob("*.yaml")}
    fragments = {*FRAGMENTS, *CLOSED_LOOP, *SCALES}
    shipped.remove("upcycle.yaml")  # needs the directory of a model, and has a test of its own
    assert shipped == {name for recipe in RECIPES for name in recipe} | {*fragments, *PAPER}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: "+".join(recipe))
def test_print_fit_test_and_reload(
    recipe: list[str], cli: Any, config: Any, tiny: Any, tmp_path: Path
) -> None:
    """A printed configuration is trained, and the run keeps it as it was printed."""
    words = [*overlays(config, recipe), *tiny(tmp_path)]
    if LONG in recipe:
        words.append("--trainer.callbacks.init_args.steps=1")
    printed = cli("fit", *words, "--print_config")
    again = tmp_path / "printed.yaml"
    again.write_text(printed.out)
    fitted = cli("fit", "-c", str(again))
    assert fitted.code == 0, fitted.err
    [kept] = tmp_path.rglob("config.yaml")
    saved, expected = yaml.safe_load(kept.read_text()), yaml.safe_load(printed.out)
    expected["weights_only"] = True  # null means it, too
    assert {name: saved[name] for name in expected} == expected
    [path] = tmp_path.rglob("epoch=0-step=2.ckpt")
    tested = cli("test", *words, f"--ckpt_path={path}")
    assert tested.code == 0, tested.err
    assert "test/loss" in tested.out

    decoder = load_decoder(path).decoder
    model = DSMoELanguageModel.load_from_checkpoint(path).eval()
    alphabet = decoder.vocab_size
    assert model.vocab_size == alphabet == (256 if recipe[0] == "quickstart.yaml" else 27)
    tokens = torch.arange(10)[None] % alphabet
    with torch.no_grad():
        plan = model.plan
        torch.testing.assert_close(decoder(tokens, plan).logits, model(tokens).logits)


@pytest.mark.slow
def test_fragments_over_the_quickstart(cli: Any, config: Any, tiny: Any, tmp_path: Path) -> None:
    words = [*overlays(config, ["quickstart.yaml", *FRAGMENTS]), *tiny(tmp_path)]
    printed = cli("fit", *words, "--print_config")
    callbacks = yaml.safe_load(printed.out)["trainer"]["callbacks"]
    assert [callback["class_path"].rpartition(".")[2] for callback in callbacks] == [
        "ModelCheckpoint",
        "ExpertUtilizationMonitor",
        "SparseEvaluation",
        "SparseCompile",
        "MIWeightAnnealing",
        "SparseCompile",
        "SparseEvaluation",
        "ThroughputMonitor",
        "ExpertUtilizationMonitor",
    ]
    again = tmp_path / "printed.yaml"
    again.write_text(printed.out)
    fitted = cli("fit", "-c", str(again))
    assert fitted.code == 0, fitted.err
    [folder] = (tmp_path / "quickstart").glob("version_0")
    header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val/sparse/threshold/loss", "val/sparse/top_1/loss"} <= set(header)
    assert load_sparse(folder / "sparse").quantization is None
    assert load_sparse(folder / "sparse_int8").quantization == "int8"
    path = folder / "checkpoints" / "last.ckpt"
    tested = cli("test", "-c", str(again), f"--ckpt_path={path}")
    assert tested.code == 0, tested.err
    assert "test/sparse/threshold_0.5/gap" in tested.out
    assert load_decoder(path).context == 16


@pytest.mark.slow
def test_a_sparsity_target_and_a_sparse_end_over_the_quickstart(
    cli: Any, config: Any, tiny: Any, tmp_path: Path
) -> None:
    words = [*overlays(config, ["quickstart.yaml", *CLOSED_LOOP]), *tiny(tmp_path)]
    too_short = cli("fit", *words)
    assert too_short.code == 1
    assert "SparseFinishing, steps=100: must be below 2, the number of" in too_short.errors[0]
    fitted = cli("fit", *words, "--trainer.callbacks.init_args.steps=1")
    assert fitted.code == 0, fitted.err
    [path] = tmp_path.rglob("epoch=0-step=2.ckpt")
    state = torch.load(path)["callbacks"]["SparsityTarget"]
    assert state["factors"] == {"experts": 1.0, "attention": 1.0}


@pytest.mark.parametrize("name", SCALES)
def test_scales_over_the_quickstart(name: str, cli: Any, config: Any) -> None:
    printed = cli("fit", *overlays(config, ["quickstart.yaml", name]), "--print_config")
    assert printed.code == 0, printed.err
    trainer = yaml.safe_load(printed.out)["trainer"]
    whole = "SparseCompile" in str(trainer["callbacks"])
    assert whole == (trainer["strategy"] == "ddp")  # the strategy that shards would refuse it
    # No flag such as find_unused_parameters: all parameters of every recipe have gradients.
    assert isinstance(trainer["strategy"], str) or "ModelParallel" in str(trainer["strategy"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: "+".join(recipe))
def test_every_parameter_has_a_gradient_as_ddp_without_flags_asks(
    recipe: list[str], cli: Any, config: Any, tiny: Any, tmp_path: Path
) -> None:
    words = [*overlays(config, recipe), *tiny(tmp_path), "--trainer.max_steps=1"]
    words += ["--trainer.callbacks=tests.commands.every_gradient.EveryGradient"]
    fitted = cli("fit", *words)
    assert fitted.code == 0, fitted.err
    assert fitted.out.count("every parameter has a gradient") == 1


@pytest.mark.parametrize("name", PAPER)
def test_sizes_of_the_paper(name: str, config: Any) -> None:
    parser = TrainingParser(exit_on_error=False)
    parser.add_lightning_class_args(DSMoELanguageModel, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    text = yaml.safe_load(Path(config(name)).read_text())
    text["model"]["init_args"]["vocab_size"] = 50257
    parsed: Any = parser.parse_object({"model": text["model"], "data": text["data"]})
    assert isinstance(parsed, jsonargparse.Namespace)
    with torch.device("meta"):
        model = parser.instantiate(parsed).model
        model.configure_model()
    counts = count_parameters(model.decoder)
    assert counts.hidden == pytest.approx(PAPER[name], rel=0.02)
