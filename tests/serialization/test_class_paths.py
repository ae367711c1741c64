"""Which classes a file may name, and by which path they are named."""

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor, nn
from torch.optim import AdamW

from lightning_dsmoe.attention import (
    Attention,
    GroupedQueryAttention,
    Llama3RopeScaling,
    MixtureOfAttentionHeads,
)
from lightning_dsmoe.experts import FeedForward, GLUExperts, MixtureOfExperts
from lightning_dsmoe.routing import LinearRouter, Router, TopK
from lightning_dsmoe.schedules import LinearWarmupCosine
from lightning_dsmoe.serialization.class_paths import (
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_SIZE,
    check_hyperparameters,
    check_sizes,
    known_class,
    shortest_path,
)


class OwnRouter(Router):
    def score(self, x: Tensor) -> Tensor:
        return x[..., : self.n_experts]


PATHS = [
    (LinearRouter, "router", "lightning_dsmoe.LinearRouter"),
    (GLUExperts, "experts", "lightning_dsmoe.GLUExperts"),
    (FeedForward, "feed_forward", "lightning_dsmoe.FeedForward"),
    (MixtureOfExperts, "feed_forward", "lightning_dsmoe.MixtureOfExperts"),
    (GroupedQueryAttention, "attention", "lightning_dsmoe.GroupedQueryAttention"),
    (MixtureOfAttentionHeads, "attention", "lightning_dsmoe.MixtureOfAttentionHeads"),
    (Llama3RopeScaling, "rope_scaling", "lightning_dsmoe.Llama3RopeScaling"),
    (TopK, "expert_selection", "lightning_dsmoe.TopK"),
    (nn.RMSNorm, "norm", "torch.nn.RMSNorm"),
    (nn.LayerNorm, "norm", "torch.nn.LayerNorm"),
    (AdamW, "optimizer", "torch.optim.AdamW"),
    (LinearWarmupCosine, "lr_scheduler", "lightning_dsmoe.schedules.LinearWarmupCosine"),
    (OwnRouter, "router", f"{__name__}.OwnRouter"),
]


@pytest.mark.parametrize(("cls", "part", "path"), PATHS)
def test_short_and_full_paths_lead_to_a_class(cls: type, part: str, path: str) -> None:
    assert shortest_path(cls) == path
    assert known_class(path, part) is cls
    assert known_class(f"{cls.__module__}.{cls.__name__}", part) is cls


def test_only_a_prefix_with_this_very_class_shortens_a_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package, module, inner = (ModuleType(name) for name in ("own", "own.parts", "own.parts.deep"))
    for each in (package, module, inner):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    mine = type("Mine", (OwnRouter,), {"__module__": "own.parts.deep"})
    package.Mine = type("Mine", (OwnRouter,), {})
    inner.Mine = mine
    assert shortest_path(mine) == "own.parts.deep.Mine"
    module.Mine = mine
    assert shortest_path(mine) == "own.parts.Mine"
    assert known_class("own.parts.Mine", "router") is mine
    package.Mine = mine
    assert shortest_path(mine) == "own.Mine"


def test_a_class_inside_a_function_keeps_a_path_that_leads_nowhere() -> None:
    class Local(OwnRouter):
        pass

    path = shortest_path(Local)
    assert path == f"{__name__}.{Local.__qualname__}"
    with pytest.raises(ValueError, match="define it at the top of a module"):
        known_class(path, "router")


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("os.system", "router"),
        ("builtins.eval", "router"),
        ("subprocess.Popen", "feed_forward"),
        ("lightning_dsmoe.TopK", "router"),
        ("lightning_dsmoe.Absent", "router"),
        ("lightning_dsmoe.routing.Router.score", "router"),
        ("lightning_dsmoe.routing.router.nn", "router"),
        ("LinearRouter", "router"),
        ("torch.nn.Linear", "norm"),
        ("torch.nn.Sequential", "norm"),
        ("torch.optim.AdamW", "norm"),
        ("", "router"),
        (None, "router"),
        (["lightning_dsmoe.routing.LinearRouter"], "router"),
    ],
)
def test_other_things_are_refused(path: object, part: str) -> None:
    with pytest.raises(ValueError, match="is not a known"):
        known_class(path, part)


def test_a_module_is_not_imported_because_a_file_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "foreign_part.py").write_text(
        "import os\nfrom lightning_dsmoe.routing import LinearRouter as Part\n"
        "os.environ['FOREIGN_PART'] = 'ran'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = {"router": {"class_path": "foreign_part.Part"}}
    for refuse in (
        lambda: known_class("foreign_part.Part", "router"),
        lambda: check_hyperparameters(options, object),
        lambda: check_hyperparameters({"_class_path": "foreign_part.Part"}, object),
    ):
        how = "import foreign_part in Python, --import foreign_part on the command line"
        with pytest.raises(ValueError, match=rf"'foreign_part\.Part' is not a known .*{how}"):
            refuse()
    assert "foreign_part" not in sys.modules
    assert "FOREIGN_PART" not in os.environ


def test_a_module_that_imports_on_demand_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    lazy = ModuleType("lazy_parts")
    lazy.__getattr__ = lambda name: asked.append(name) or OwnRouter  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "lazy_parts", lazy)
    assert lazy.Part is OwnRouter
    asked.clear()
    for options in (
        {"router": {"class_path": "lazy_parts.Part"}},
        {"_class_path": "lazy_parts.Part"},
    ):
        with pytest.raises(ValueError, match=r"'lazy_parts\.Part' is not a known Router"):
            check_hyperparameters(options, Router)
    assert asked == []


def test_sizes_up_to_a_limit() -> None:
    largest = {"n_layers": MAX_LAYERS, "n_experts": MAX_EXPERTS, "d_model": MAX_SIZE}
    check_sizes({**largest, "d_shared": 0, "bias": True, "rope_theta": 1e9, "name": "x"})
    for name, value in largest.items():
        for bad in (value + 1, 10**30, -1):
            with pytest.raises(ValueError, match=f"{name}={bad} is out of range, 0 to {value} is"):
                check_sizes({name: bad})


ROUTER = {"class_path": "lightning_dsmoe.routing.MLPRouter", "init_args": {"d_hidden": 4}}
FEED_FORWARD = {
    "class_path": "lightning_dsmoe.MixtureOfExperts",
    "init_args": {"n_experts": 4, "d_expert": 8, "router": ROUTER, "gate_scale": "mean_one"},
}
HYPERPARAMETERS: dict[str, Any] = {
    "_class_path": f"{__name__}.OwnRouter",
    "_instantiator": "lightning.pytorch.cli.instantiate_module",
    "d_model": 8,
    "dropout": 0.5,
    "max_positions": None,
    "feed_forward": FEED_FORWARD,
    "norm": {"class_path": "torch.nn.RMSNorm"},
    "expert_selection": {"class_path": "lightning_dsmoe.TopK", "init_args": {"k": 2}},
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.9, 0.95]}},
    "lr_scheduler": {
        "class_path": "lightning_dsmoe.schedules.LinearWarmupCosine",
        "init_args": {"max_steps": 10**9},
    },
}


def test_hyperparameters_of_a_command_line_pass() -> None:
    check_hyperparameters(HYPERPARAMETERS, Router)
    check_hyperparameters({}, Router)


def router(**changes: object) -> dict[str, Any]:
    options = {**FEED_FORWARD["init_args"], "router": {**ROUTER, **changes}}
    return {"feed_forward": {**FEED_FORWARD, "init_args": options}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 10**9}, "d_model=1000000000 is out of range"),
        (router(class_path="os.system"), "'os.system' is not a known Router"),
        (router(init_args={"d_hidden": 10**9}), "d_hidden=1000000000 is out of range"),
        (router(init_args={"n_experts": 5000}), "n_experts=5000 is out of range"),
        (router(init_args=["d_hidden", 4]), "init_args of router must be an object"),
        (router(dict_kwargs={}), "router needs a class_path and init_args"),
        ({"router": "lightning_dsmoe.routing.LinearRouter"}, "router needs a class_path"),
        ({"router": [ROUTER]}, "router needs a class_path"),
        ({"other": {"class_path": "os.system"}}, "'os.system' is not a known"),
        ({"other": {}}, "other needs a class_path"),
        ({"activation": "__import__('os')"}, "activation must be a plain word"),
        ({"a\nb": -1}, r"^'a\\nb' is not the name of an option$"),
        ({3: 1}, "^3 is not the name of an option$"),
        (router(init_args={"x" * 10**6: 1}), "^'x+[.]{3}x+' is not the name of an option$"),
        ({"betas": [0.9, "0.95"]}, "betas may hold numbers only"),
        ({"_class_path": "os.system"}, "'os.system' is not a known Router"),
        ({"_class_path": "torch.nn.Linear"}, "'torch.nn.Linear' is not a known Router"),
    ],
)
def test_other_hyperparameters_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_hyperparameters({**HYPERPARAMETERS, **change}, Router)


SCALING = {"class_path": "lightning_dsmoe.LinearRopeScaling", "init_args": {"factor": 2.0}}
HEADS = {
    "class_path": "lightning_dsmoe.GroupedQueryAttention",
    "init_args": {"n_heads": 4, "qk_norm": "projection", "rope_scaling": SCALING},
}


def test_a_part_of_each_layer() -> None:
    plain = {**HEADS, "init_args": {**HEADS["init_args"], "rope_scaling": None}}
    options = {"feed_forward": [FEED_FORWARD, FEED_FORWARD], "attention": [HEADS, plain]}
    check_hyperparameters({**HYPERPARAMETERS, **options}, Router)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feed_forward": [FEED_FORWARD, HEADS]}, "is not a known FeedForwardLayer"),
        ({"feed_forward": [FEED_FORWARD, 8]}, "feed_forward needs a class_path .* layer, got 8"),
        ({"feed_forward": [router(class_path="os.system")["feed_forward"]]}, "os.system"),
        ({"feed_forward": [FEED_FORWARD] * 1025}, "of 1025 layers, up to 1024 are allowed"),
        ({"norm": [FEED_FORWARD]}, "norm needs a class_path and init_args, got"),
        ({"rope_scaling": "linear"}, "rope_scaling needs a class_path and init_args, got 'linear'"),
        ({"rope_scaling": FEED_FORWARD}, "is not a known RopeScaling"),
        ({"rope_scaling": {**SCALING, "init_args": {"factor": 10**9}}}, "factor=1000000000 is out"),
    ],
)
def test_other_parts_of_layers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_hyperparameters({**HYPERPARAMETERS, **options}, Router)


def test_every_part_has_a_base_that_files_may_name_subclasses_of() -> None:
    assert known_class("lightning_dsmoe.attention.Attention", "attention") is Attention
    with pytest.raises(ValueError, match="is not a known Attention"):
        known_class("lightning_dsmoe.routing.LinearRouter", "attention")


def test_a_message_names_each_base_once_in_one_order() -> None:
    bases = (
        "Attention or FeedForwardLayer or Module or Router or Experts or RopeScaling or Selection"
    )
    with pytest.raises(ValueError, match=rf"is not a known {bases} or Optimizer or LRScheduler$"):
        known_class("os.system", "dropout")
