import hashlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dsmoe.attention import GroupedQueryAttention, MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder, TokenEmbedding, TokenHead
from lightning_dsmoe.experts import FeedForward, GLUExperts, MixtureOfExperts, MLPExperts
from lightning_dsmoe.inference.compilation import compile_sparse
from lightning_dsmoe.inference.engine.batched import gpu_costs, grouped_layers
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.routing import LinearRouter, SelectionPlan, Threshold, TopK
from lightning_dsmoe.stacked import StackedWeight

MakeDecoder = Callable[..., Decoder]

DATA = ("config.json", "plan.json", "model.safetensors")
CERTIFICATE = {"loss": 1.5, "tokens": 12}

UNCOMPILED = SwitchPoints(gather_up_to=0)

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"top_k": 2},
    {"top_p": 0.5},
    {"top_k": 3, "top_p": 0.9},
]

ROUTER = partial(LinearRouter, init_std=0.5)
ATTENTION = partial(MixtureOfAttentionHeads, n_experts=3, n_heads=1, d_head=4, router=ROUTER)
FEED_FORWARD = partial(MixtureOfExperts, n_experts=4, d_expert=6, router=ROUTER)


def rotary_glu(**options: object) -> Decoder:
    glu = partial(GLUExperts, activation="silu")
    parts = {"attention": ATTENTION, "feed_forward": partial(FEED_FORWARD, experts=glu)}
    return louder(Decoder(29, 16, 2, **parts | options))


def learned_positions_mlp(**options: object) -> Decoder:
    parts = {
        "attention": partial(ATTENTION, n_heads=2, rope_theta=None, qk_norm=True, bias=True),
        "feed_forward": partial(FEED_FORWARD, experts=partial(MLPExperts, bias=True), d_shared=5),
        "max_positions": 20,
        "tie_embeddings": False,
        "dropout": 0.1,
    }
    return louder(Decoder(29, 12, 2, **parts | options))


def without_routers(**options: object) -> Decoder:
    parts = {
        "attention": partial(GroupedQueryAttention, n_heads=4, n_kv_heads=2, d_head=4),
        "feed_forward": partial(FeedForward, d_hidden=10),
    }
    return louder(Decoder(29, 12, 2, **parts | options))


@pytest.fixture(autouse=True)
def grouping_always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each expert on its own tokens in models that are too small for it to be faster."""
    for costs in (grouped_layers, gpu_costs):
        monkeypatch.setattr(costs, "grouping_pays", lambda *args: True)


def assert_near(actual: Tensor, expected: Tensor, relative: float = 2e-6) -> None:
    """Equal but for rounding, measured by the largest value."""
    assert actual.dtype == expected.dtype
    bound = relative * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


def louder(decoder: Decoder) -> Decoder:
    """Larger weights, so that logits are apart and the layers outweigh the embeddings."""
    with torch.no_grad():
        for module in decoder.modules():
            if isinstance(module, StackedWeight):
                module.weight.mul_(4)
            elif isinstance(module, TokenEmbedding | TokenHead):
                nn.init.normal_(module.weight, std=0.5)
    return decoder.eval()


@pytest.fixture(params=[rotary_glu, learned_positions_mlp])
def make_decoder(request: pytest.FixtureRequest) -> MakeDecoder:
    return request.param


@pytest.fixture
def decoder(make_decoder: MakeDecoder) -> Decoder:
    return make_decoder()


@pytest.fixture
def one_decoder() -> Decoder:
    return rotary_glu()


@pytest.fixture
def plan() -> SelectionPlan:
    return SelectionPlan.of_blocks(
        (TopK(2), Threshold(0.9)), (TopK(1, renormalize=True), Threshold(0.8))
    )


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(29, (3, 16), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    paths = {}
    torch.manual_seed(3)
    decoder, plan = rotary_glu(), SelectionPlan()
    for name, quantization in (("float", None), ("int8", "int8")):
        paths[name] = folder / name
        model = compile_sparse(decoder, plan, quantization=quantization)  # type: ignore[arg-type]
        model.save(paths[name], certificate=CERTIFICATE)
    return paths


@pytest.fixture(params=["float", "int8"])
def artifact(request: pytest.FixtureRequest, originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals[request.param], tmp_path / "artifact"))


@pytest.fixture
def float_artifact(originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals["float"], tmp_path / "artifact"))


def sign(path: Path) -> None:
    """Make the sums fit the files, as someone who forges them would."""
    lines = []
    for name in sorted(name for name in ("certificate.json", *DATA) if (path / name).exists()):
        with (path / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    (path / "SHA256SUMS").write_text("".join(lines))
