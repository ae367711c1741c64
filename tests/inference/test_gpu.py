"""A model on a CUDA device against the same model on the CPU, in double precision."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.attention import head_groups
from lightning_dsmoe.attention.rotary import Rotation, rotation
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference import SparseModel, SwitchPoints, compile_sparse
from lightning_dsmoe.inference.engine.decode import step
from lightning_dsmoe.routing import (
    AllExperts,
    Selection,
    SelectionPlan,
    Threshold,
    ThresholdTopK,
    TopK,
    TopP,
)

from .conftest import UNCOMPILED, learned_positions_mlp, rotary_glu, without_routers

pytestmark = pytest.mark.gpu

ROUNDING = 1e-9
MODELS = [rotary_glu, learned_positions_mlp, without_routers]
RULES = [AllExperts(), TopK(2), Threshold(0.9), ThresholdTopK(0.5), TopP(0.6)]

make = pytest.mark.parametrize("make", MODELS)
rule = pytest.mark.parametrize("rule", RULES, ids=str)


@pytest.fixture(autouse=True)
def rotations_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sines and cosines are float32, each device's own, and would hide other differences."""

    def on_cpu(positions: Tensor, d_head: int, theta: float) -> Rotation:
        by = rotation(positions.cpu(), d_head, theta)
        return Rotation(*(part.to(positions.device) for part in by))

    for module in (head_groups, step):
        monkeypatch.setattr(module, "rotation", on_cpu)


def everywhere(rule: Selection) -> SelectionPlan:
    return SelectionPlan(experts=rule, attention=rule)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return ((actual.cpu() - expected).abs().max() / expected.abs().max()).item()


@make
def test_training(make: Callable[[], Decoder]) -> None:
    decoder = make().double().train()
    for module in decoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokens_BT = torch.randint(29, (3, 12))
    grads = []
    for device in ("cpu", "cuda"):
        decoder.to(device).zero_grad()
        logits_BTV, _ = decoder(tokens_BT.to(device))
        logits_BTV.logsumexp(-1).mean().backward()
        grads.append([p.grad.cpu().clone() for p in decoder.parameters() if p.grad is not None])
    largest = max(grad.abs().max() for grad in grads[0])
    for on_cpu, on_gpu in zip(*grads, strict=True):
        assert (on_gpu - on_cpu).abs().max() < ROUNDING * largest


@make
@rule
def test_plans(make: Callable[[], Decoder], rule: Selection) -> None:
    decoder = make().double().eval()
    model = compile_sparse(decoder, everywhere(rule), switch_points=UNCOMPILED)
    tokens_BT = torch.randint(29, (3, 12))
    with torch.no_grad():
        expected_BTV = model.logits(tokens_BT)
        actual_BTV = model.to("cuda").logits(tokens_BT.cuda())
    assert difference(actual_BTV, expected_BTV) < ROUNDING


@make
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("points", [UNCOMPILED, SwitchPoints()], ids=["uncompiled", "default"])
def test_generation(
    make: Callable[[], Decoder], quantization: str | None, points: SwitchPoints
) -> None:
    model = compile_sparse(
        make().eval(), everywhere(Threshold(0.9)), quantization=quantization, switch_points=points
    )
    prompt_BT = torch.randint(29, (2, 3))
    expected_BT = model.generate(prompt_BT, 8, temperature=0)
    actual_BT = model.to("cuda").generate(prompt_BT.cuda(), 8, temperature=0)
    assert torch.equal(actual_BT.cpu(), expected_BT)


def test_artifacts_load_and_move(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("artifact") / "sparse"
    decoder = rotary_glu().double().eval()
    compile_sparse(decoder, everywhere(Threshold(0.9)), switch_points=UNCOMPILED).save(folder)
    tokens_BT = torch.randint(29, (2, 5))
    with torch.no_grad():
        expected_BTV = SparseModel.load(folder).logits(tokens_BT)
        actual_BTV = SparseModel.load(folder).to("cuda").logits(tokens_BT.cuda())
    assert difference(actual_BTV, expected_BTV) < ROUNDING


def test_tuning() -> None:
    decoder = rotary_glu().eval()
    model = compile_sparse(decoder, everywhere(Threshold(0.9))).to("cuda")
    assert model.switch_points.gather_up_to in (0, 16)
    assert torch.cuda.get_device_name() in str(model.tune().measured_on)
