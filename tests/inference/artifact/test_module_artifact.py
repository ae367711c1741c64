"""Artifacts of models that their users build."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_dsmoe.attention import LinearRopeScaling, MixtureOfAttentionHeads
from lightning_dsmoe.experts import MixtureOfExperts, MLPExperts
from lightning_dsmoe.inference import SparseModule, compile_sparse, load_sparse
from lightning_dsmoe.inference.artifact.certificate import save_certificate
from lightning_dsmoe.routing import LinearRouter, SelectionPlan, TopK

from ..conftest import CERTIFICATE, FEED_FORWARD, UNCOMPILED, sign
from ..networks import Network, network, plan_of


class CosineLike(LinearRouter):
    pass


@pytest.fixture(params=[None, "int8"])
def sparse(request: pytest.FixtureRequest) -> SparseModule:
    options = {"quantization": request.param, "switch_points": UNCOMPILED}
    made: SparseModule = compile_sparse(network(), plan_of(TopK(2)), **options)
    return made


@pytest.fixture
def path(sparse: SparseModule, tmp_path: Path) -> Path:
    sparse.save(tmp_path / "model", CERTIFICATE)
    return tmp_path / "model"


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 9, 6)


def change(path: Path, **fields: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))
    (path / "certificate.json").unlink()
    sign(path)


def test_round_trip(sparse: SparseModule, path: Path, x: Tensor) -> None:
    user_model = network()
    before = {name: tensor.clone() for name, tensor in user_model.state_dict().items()}
    loaded = load_sparse(path, model=user_model)
    assert torch.equal(loaded(x), sparse(x))
    assert loaded.plan == sparse.plan
    assert loaded.quantization == sparse.quantization
    assert loaded.report() == sparse.report()
    assert loaded.switch_points == UNCOMPILED
    assert loaded.model.tied.weight is loaded.model.out.weight
    assert torch.equal(loaded.model.bounds, sparse.model.bounds)
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, tensor in user_model.state_dict().items():
        assert torch.equal(tensor, before[name])
    loaded.save(path, CERTIFICATE)
    assert torch.equal(load_sparse(path, model=network())(x), sparse(x))


def test_shared_tensors_are_stored_once(path: Path) -> None:
    names = load_file(path / "model.safetensors").keys()
    assert "out.weight" in names
    assert "tied.weight" not in names


def test_bfloat16(sparse: SparseModule, tmp_path: Path, x: Tensor) -> None:
    sparse.to(torch.bfloat16).save(tmp_path / "half")
    loaded = load_sparse(tmp_path / "half", model=network())
    loaded.model.steps = loaded.model.steps.bfloat16()  # a buffer that no file holds
    assert torch.equal(loaded(x.bfloat16()), sparse(x.bfloat16()))


def test_a_certificate_can_be_replaced(sparse: SparseModule, path: Path) -> None:
    save_certificate(path, sparse, {"loss": 2.5})
    assert "- loss: 2.5" in (path / "README.md").read_text()
    load_sparse(path, model=network())


def test_the_card(sparse: SparseModule) -> None:
    card = sparse.card({"loss": 1.5})
    assert "---\n\n# A sparse Network\n\n- 6 routed layers, " in card
    assert "- running: experts: top 2; attention: top 2\n" in card
    assert ("- in 8 bits: nothing" in card) == (sparse.quantization is None)
    assert 'load_sparse(".", model=Network(...))' in card


def test_the_model_is_needed_or_one_too_many(path: Path, originals: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"not the code of their model: .* model=MyModel\(\)"):
        load_sparse(path)
    with pytest.raises(ValueError, match="the sparse model of a Decoder"):
        load_sparse(originals["float"], model=network())
    with pytest.raises(FileNotFoundError, match="no sparse model"):
        load_sparse(path / "nowhere", model=network())
    with pytest.raises(ValueError, match="a sparse one already"):
        load_sparse(path, model=load_sparse(path, model=network()))


def test_another_model_is_refused_before_anything_is_loaded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_dsmoe.inference.artifact.module_artifact._load", None)
    other = network()
    other.more = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"missing more\.weight; missing more\.bias"):
        load_sparse(path, model=other)
    other = network()
    other.into = nn.Linear(7, 24)
    with pytest.raises(ValueError, match=r"into.weight is \(24, 6\), not \(24, 7\)"):
        load_sparse(path, model=other)
    untied = network()
    untied.tied.weight = nn.Parameter(untied.tied.weight.clone())
    with pytest.raises(ValueError, match=r"missing tied\.weight"):
        load_sparse(path, model=untied)
    with pytest.raises(ValueError, match="has no routed layer 'paper'"):
        load_sparse(path, model=nn.Sequential(FEED_FORWARD(8)))
    with pytest.raises(ValueError, match="this Linear has none"):
        load_sparse(path, model=nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["config.json", "plan.json", "model.safetensors", "SHA256SUMS"])
def test_a_changed_or_missing_file_is_refused(name: str, path: Path) -> None:
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-2] + b"  ")
    with pytest.raises(ValueError, match=r"was changed|is not JSON|does not match"):
        load_sparse(path, model=network())
    (path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_sparse(path, model=network())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"module": 3}, "module must be a string"),
        ({"matrix_type": "int4"}, "matrix_type must be"),
        ({"quantization": "int4"}, "quantization must be"),
        ({"code": "os.system"}, "missing or unknown"),
        ({"format_version": 99}, "has format 99"),
        ({"remaining": {"paper": [0, 1]}}, "other experts removed"),
    ],
)
def test_a_forged_configuration_is_refused(
    fields: dict[str, object], words: str, path: Path
) -> None:
    change(path, **fields)
    with pytest.raises(ValueError, match=words):
        load_sparse(path, model=network())


def test_a_name_in_a_file_is_never_looked_for(path: Path, x: Tensor, sparse: SparseModule) -> None:
    change(path, module="os.system")
    assert torch.equal(load_sparse(path, model=network())(x), sparse(x))


def test_weights_that_are_not_finite_are_refused(path: Path, sparse: SparseModule) -> None:
    state = load_file(path / "model.safetensors")
    state["into.bias"][0] = torch.nan
    save_file(state, path / "model.safetensors")
    (path / "certificate.json").unlink()
    sign(path)
    with pytest.raises(ValueError, match=r"into\.bias holds NaN"):
        load_sparse(path, model=network())
    with torch.no_grad():
        sparse.model.into.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"into\.bias holds NaN"):
        sparse.save(path.parent / "nan")
    assert not (path.parent / "nan").exists()


def test_a_certificate_of_other_weights_is_refused(path: Path, tmp_path: Path) -> None:
    other: SparseModule = compile_sparse(network(), plan_of(TopK(2)), switch_points=UNCOMPILED)
    other.save(tmp_path / "other")
    shutil.copy(path / "certificate.json", tmp_path / "other")
    sign(tmp_path / "other")
    with pytest.raises(ValueError, match=r"certified for another configuration|other weights"):
        load_sparse(tmp_path / "other", model=network())


def test_a_state_that_holds_more_than_tensors_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = FEED_FORWARD(8)

        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

    sparse = compile_sparse(Extra(), SelectionPlan(), switch_points=UNCOMPILED)
    with pytest.raises(ValueError, match="_extra_state is a dict"):
        sparse.save(tmp_path / "model")


def test_a_model_on_the_meta_device(path: Path, sparse: SparseModule, x: Tensor) -> None:
    with torch.device("meta"):
        empty = Network()
    with pytest.raises(ValueError, match="must be persistent to be restored: steps"):
        load_sparse(path, model=empty)
    empty.steps = torch.arange(3.0)
    assert torch.equal(load_sparse(path, model=empty)(x), sparse(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_scale": "sum_to_one"}, "gate_scale of 0 was 'mean_one', is 'sum_to_one'"),
        (
            {"experts": partial(MLPExperts, activation="relu")},
            "activation of 0 was 'gelu', is 'relu'",
        ),
        ({"router": CosineLike}, "router of 0 was 'LinearRouter', is 'CosineLike'"),
    ],
)
def test_options_without_weights_must_be_the_same(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    def made(**options: Any) -> nn.Module:
        return nn.Sequential(MixtureOfExperts(8, 4, 6, **options))

    compile_sparse(made(), SelectionPlan(TopK(1))).save(tmp_path / "model")
    assert load_sparse(tmp_path / "model", model=made()).plan == SelectionPlan(TopK(1))
    with pytest.raises(ValueError, match=f"is of another model: {message}"):
        load_sparse(tmp_path / "model", model=made(**options))


SCALED = LinearRopeScaling(2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_scaling": SCALED}, r"rope_scaling of 0 was None, is 'LinearRopeScaling\(factor=2"),
        ({"rotary_fraction": 0.5}, r"rotary_fraction of 0 was 1\.0, is 0\.5"),
        ({"norm_eps": 0.1}, r"norm_eps of 0 was None, is 0\.1"),
    ],
)
@pytest.mark.parametrize("older", [False, True])
def test_options_of_attention_must_be_the_same(
    older: bool, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    def made(**options: Any) -> nn.Module:
        return nn.Sequential(MixtureOfAttentionHeads(8, 3, 1, 4, qk_norm=True, **options))

    compile_sparse(made(), SelectionPlan()).save(tmp_path / "model")
    if older:  # before there were these options
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        for name in ("rope_scaling", "rotary_fraction", "norm_eps"):
            del config["layers"]["0"][name]
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        sign(tmp_path / "model")
    load_sparse(tmp_path / "model", model=made())
    with pytest.raises(ValueError, match=f"is of another model: {message}"):
        load_sparse(tmp_path / "model", model=made(**options))
