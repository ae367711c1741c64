"""A vision transformer on digits, for a few steps."""

import csv
import inspect
import re
from pathlib import Path

import pytest
import torch

from examples import vision
from lightning_dsmoe import routed_layers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def test_dense_against_sparse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    vision.main(tmp_path / "run", steps=200)
    found = re.findall(r"^(.+?) {2,}([\d.]+)%", capsys.readouterr().out, re.MULTILINE)
    accuracy = {name: float(value) for name, value in found}
    assert [*accuracy] == ["dense twin", "all experts", "under the plan", "the same in 8 bits"]
    assert min(accuracy.values()) > 50  # 10 by chance
    assert abs(accuracy["the same in 8 bits"] - accuracy["under the plan"]) < 5
    folder = tmp_path / "run" / "mixture"
    with (folder / "metrics.csv").open() as file:
        last = [row for row in csv.DictReader(file) if row["val/sparse/plan/accuracy"]][-1]
    assert f"{100 * float(last['val/sparse/plan/accuracy']):.1f}" == f"{accuracy['under the plan']}"
    assert 0.3 < float(last["val/sparse/plan/active_share"]) < 0.35
    assert (folder / "utilization" / "last.png").exists()
    assert (folder / "sparse" / "model.safetensors").exists()
    assert [*(tmp_path / "elsewhere").iterdir()] == []


def test_lines_for_the_library_are_few() -> None:
    lines = inspect.getsource(vision.MixtureClassifier).splitlines()
    assert len([line for line in lines if "rout" in line]) <= 5
    assert "rout" not in inspect.getsource(vision.Classifier)


def test_the_twin_has_all_parameters_but_those_of_routers() -> None:
    mixture, twin = vision.mixture(), vision.dense_twin()
    routers = [layer.router for layer in routed_layers(mixture).values()]
    assert len(routers) == 2 * vision.LAYERS
    size = sum(p.numel() for p in mixture.parameters())
    of_routers = sum(p.numel() for router in routers for p in router.parameters())
    assert sum(p.numel() for p in twin.parameters()) == size - of_routers


def test_every_patch_attends_to_every_other() -> None:
    images = torch.rand(1, 8, 8)
    changed = images.clone()
    changed[0, 7, 7] += 1
    for model in (vision.mixture(), vision.dense_twin()):
        x = [model.patches(vision.patches(each)) + model.positions for each in (images, changed)]
        first, other = (model.blocks(each)[0, 0] for each in x)
        assert not torch.allclose(first, other, atol=1e-6)


def test_without_noise_images_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(3, 8, 8)
    assert not torch.allclose(vision.warped(images), images, atol=0.01)
    monkeypatch.setattr(torch, "randn", torch.zeros)
    torch.testing.assert_close(vision.warped(images), images)


def test_each_image_is_tested_once() -> None:
    test = [vision.digits(fold=fold, seed=1)[1].tensors[0] for fold in range(5)]
    train, _ = vision.digits(fold=0, seed=1)
    everything = torch.cat(test)
    assert len(everything) == 1797
    assert torch.equal(
        everything.flatten(1).sum(0), torch.cat([test[0], train.tensors[0]]).flatten(1).sum(0)
    )
    assert not {image.numpy().tobytes() for image in test[0]} & {
        image.numpy().tobytes() for image in train.tensors[0]
    }
