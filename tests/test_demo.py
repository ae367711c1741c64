"""The demonstration, on a text and a model of toy size."""

import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from lightning_dsmoe import SparseModel, load_sparse

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.fixture
def demo() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    yield module
    logger.setLevel(level)


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20]), int.from_bytes(header[20:24])


def test_loss_curve(demo: ModuleType, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.csv"
    metrics.write_text(
        "step,train/loss,val/loss,val/sparse/threshold/loss\n0,5.5,,\n1,4.5,,\n1,,4.0,4.1\n"
    )
    demo.loss_curve(metrics, tmp_path / "loss.png")
    assert png_size(tmp_path / "loss.png") == (840, 480)


def test_all_of_it(
    demo: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    nothing_compiles: None,
) -> None:
    shipped = ROOT / "cli_configs" / "quickstart.yaml"
    options = yaml.safe_load(shipped.read_text())
    text = tmp_path / "text.txt"
    text.write_text("def __init__(self):\n    pass\n" * 200)
    options["data"]["init_args"] |= {
        "files": str(text),
        "cache_dir": str(tmp_path),
        "context": 32,
        "batch_size": 2,
    }
    options["model"]["init_args"] |= {"d_model": 16, "n_layers": 1}
    options["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "limit_test_batches": 2}
    (tmp_path / "quickstart.yaml").write_text(yaml.safe_dump(options))
    monkeypatch.setattr(demo, "files", lambda package: tmp_path)
    monkeypatch.setattr(demo, "OUTPUT", tmp_path / "output")
    for name, size in {"WIDTH": 16, "LAYERS": 2, "D_EXPERT": 4, "D_HEAD": 4}.items():
        monkeypatch.setattr(demo, name, size)
    monkeypatch.setattr(sys, "argv", ["demo.py"])

    demo.main()

    out = capsys.readouterr().out
    assert out.index("active share") < out.index("test loss") < out.index("tokens/s")
    assert out.count(demo.PROMPT) == 1
    folder = tmp_path / "output" / "quickstart" / "version_0"
    assert png_size(folder / "loss.png") == (840, 480)
    assert min(png_size(folder / "utilization" / "last.png")) > 100
    assert isinstance(load_sparse(folder / "sparse"), SparseModel)


def test_parameters_read_are_those_of_the_experts_that_run(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, nothing_compiles: None
) -> None:
    for name, size in {
        "WIDTH": 16,
        "LAYERS": 2,
        "D_EXPERT": 4,
        "D_HEAD": 4,
        "VOCABULARY": 8,
    }.items():
        monkeypatch.setattr(demo, name, size)
    parameters, read, *_ = zip(*(column.cells for column in demo.speed(1.0).columns), strict=True)
    assert parameters[1:] == read[1:]
    head_and_embedding, router = 8 * 16, 16 * (32 + 8)
    norms, keys_and_values = (2 * 2 + 1) * 16, 2 * 2 * 2 * 4 * 16
    per_expert, per_group = 2 * 4 * 16, 2 * 2 * 4 * 16
    one_of_each = per_expert + per_group + router
    expected = head_and_embedding + norms + keys_and_values + 2 * one_of_each
    _, read, *_ = zip(*(column.cells for column in demo.speed(0.01).columns), strict=True)
    assert read[2] == f"{expected / 1e6:.3g}"
