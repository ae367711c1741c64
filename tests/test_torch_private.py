"""What torch keeps to itself: one home, and what happens where it is missing."""

import _thread
import ast
import importlib.util
import re
import warnings
from collections.abc import Callable
from functools import partial
from io import BytesIO
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_dsmoe
from lightning_dsmoe import (
    Decoder,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
    SelectionPlan,
    TopK,
    compile_sparse,
    record_routings,
    run_plan,
    torch_private,
)
from lightning_dsmoe.inference.engine.decode.compiled_step import CannotCompile
from lightning_dsmoe.routing import interception
from lightning_dsmoe.stacked import dispatch, projection

PACKAGE = Path(lightning_dsmoe.__file__).parent
PUBLIC = {"torch._check"}  # documented, in spite of its name
DISABLE = "_compile._disable_dynamo"
GRAPH_TASK = "_C._current_graph_task_id"
TRANSFORMS = "_C._are_functorch_transforms_active"
COMPILED = [torch_private._COMPILE, torch_private._LOAD, torch_private._RUN]
PLAN = SelectionPlan(TopK(2), TopK(1))


def private_names(code: str) -> set[str]:
    """Dotted names of torch, as code imports or reads them, with a part that begins with `_`."""
    tree = ast.parse(code)
    known: dict[str, str] = {}
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                names.add(each.name)
                top = each.name.split(".")[0]
                known[each.asname or top] = each.name if each.asname else top
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for each in node.names:
                names.add(f"{node.module}.{each.name}")
                known[each.asname or each.name] = f"{node.module}.{each.name}"
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name):
            names.add(".".join([known.get(node.id, node.id), *reversed(parts)]))
    return {name for name in names if is_private(name)}


def is_private(name: str) -> bool:
    if name.split(".")[0] != "torch" or any(f"{name}.".startswith(f"{one}.") for one in PUBLIC):
        return False
    return any(part[0] == "_" and part[-2:] != "__" for part in name.split("."))


def without(name: str) -> ModuleType:
    """The module as it is where torch lacks a name when it is imported."""
    spec = importlib.util.spec_from_file_location("copy", torch_private.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    owner, _, last = name.rpartition(".")
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(attrgetter(owner)(torch), last)
        with pytest.warns(UserWarning, match=lacks(name)) as seen:
            spec.loader.exec_module(module)
    assert len(seen) == 1
    return module


def lacks(name: str) -> str:
    version = re.escape(torch.__version__)
    return rf"^torch {version} has no torch\.{re.escape(name)}, which 2\.10 to 2\.15 have"


@pytest.fixture
def decoder() -> Decoder:
    attention = partial(MixtureOfAttentionHeads, n_experts=3, n_heads=1, d_head=4)
    feed_forward = partial(MixtureOfExperts, n_experts=4, d_expert=8)
    model = Decoder(11, 16, 2, attention=attention, feed_forward=feed_forward)
    for name, parameter in model.named_parameters():
        if "router" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import torch; torch._C.x", {"torch._C", "torch._C.x"}),
        ("import torch as t; t.a._b()", {"torch.a._b"}),
        ("from torch import _VF", {"torch._VF"}),
        ("from torch._a import b; b.c()", {"torch._a.b", "torch._a.b.c"}),
        ("import torch._dynamo", {"torch._dynamo"}),
        ("def f():\n  from torch.nn import functional as F\n  F._x", {"torch.nn.functional._x"}),
        ("import torch; torch._check(1); torch.__version__; self._x; '''torch._y'''", set()),
        ("import torch; torch._check_is_size(1)", {"torch._check_is_size"}),
        ("from torchmetrics import _x", set()),
    ],
)
def test_how_private_names_are_found(code: str, found: set[str]) -> None:
    assert private_names(code) == found


def test_no_other_file_uses_a_private_name() -> None:
    top = Path(__file__).parents[1]
    found = {}
    for folder in ("lightning_dsmoe", "callbacks", "benchmarks", "examples"):
        for path in (top / folder).rglob("*.py"):
            if names := private_names(path.read_text(encoding="utf-8")):
                found[path.relative_to(top).as_posix()] = names
    assert found == {}  # what the home of them reads, it reads by strings


def test_nothing_is_missing_from_this_version() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in (DISABLE, GRAPH_TASK, TRANSFORMS):
            assert torch_private._optional(name, "") is not None
        for name in COMPILED:
            assert torch_private._needed(name) is not None


@pytest.fixture(params=[False, True], ids=["as torch is", "without it"])
def is_missing(request: pytest.FixtureRequest) -> bool:
    missing: bool = request.param
    return missing


@pytest.mark.parametrize("recursive", [False, True])
def test_the_compiler_is_kept_out(is_missing: bool, recursive: bool) -> None:
    module = without(DISABLE) if is_missing else torch_private

    def inner() -> bool:
        return torch.compiler.is_compiling()

    def outer(run: Callable[[], bool], seen: list[bool]) -> None:
        seen += [torch.compiler.is_compiling(), run()]

    seen: list[bool] = []
    kept_out = module.not_compiled(outer, recursive=recursive)
    compiled_inner = torch.compile(inner, backend="eager")

    @torch.compile(backend="eager")
    def whole(x: Tensor) -> Tensor:
        kept_out(compiled_inner, seen)
        return x + 1

    assert whole(torch.ones(1)) == 2
    assert seen[0] is False
    assert kept_out.__name__ == "outer"


def test_backward_passes_are_seen(is_missing: bool) -> None:
    in_backward_pass = (without(GRAPH_TASK) if is_missing else torch_private).in_backward_pass
    for use_reentrant in (False, True):
        seen = []

        def layer(x: Tensor, seen: list[bool] = seen) -> Tensor:
            seen.append(in_backward_pass())
            return x.sin()

        x = torch.ones(2, requires_grad=True)
        y = checkpoint(layer, x, use_reentrant=use_reentrant)
        y.sum().backward()
        assert seen == [False, True]
    seen = []
    y = torch.ones(2, requires_grad=True).sin()
    y.register_hook(lambda grad: seen.append(in_backward_pass()))
    torch.autograd.grad(y.sum(), y)
    assert seen == [True]
    assert not in_backward_pass()


def test_threads_that_python_did_not_start_run_a_backward_pass() -> None:
    in_backward_pass = without(GRAPH_TASK).in_backward_pass
    seen: list[bool] = []
    done = _thread.allocate_lock()
    done.acquire()

    def run() -> None:
        seen.append(in_backward_pass())
        done.release()

    _thread.start_new_thread(run, ())
    assert done.acquire(timeout=10)
    assert seen == [True]


def test_what_is_recomputed_is_recorded_once(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = decoder.blocks[0].feed_forward
    x = torch.randn(2, 5, 16, requires_grad=True)
    found = []
    for asks in (torch_private.in_backward_pass, without(GRAPH_TASK).in_backward_pass):
        monkeypatch.setattr(interception, "in_backward_pass", asks)
        with run_plan(layer, PLAN), record_routings(layer) as record:
            y = checkpoint(lambda x: layer(x).output.sin(), x, use_reentrant=False)
            y.square().sum().backward()
        [routing] = record.routings.values()
        found.append([routing.probs, y, x.grad, *(p.grad for p in layer.parameters())])
        layer.zero_grad()
        x.grad = None
    assert found[0][0].shape == (2, 5, 4)  # once: a second record would be beside it
    for expected, actual in zip(*found, strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("way", ["sorted"], indirect=True)
def test_mixtures_give_the_same(
    decoder: Decoder, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.arange(10).view(2, 5)
    found = []
    for module in (torch_private, without(TRANSFORMS)):
        for user in (dispatch, projection):
            monkeypatch.setattr(user, "in_function_transform", module.in_function_transform)
        assert dispatch.worth_sorting(1, 1, torch.device("cpu"), n_kernels=1) is (not found)
        found.append([])
        for plan in (SelectionPlan(), PLAN):
            logits = decoder(tokens, plan).logits
            logits.square().sum().backward()
            found[-1] += [logits.detach(), *(p.grad.clone() for p in decoder.parameters())]
            decoder.zero_grad()
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", COMPILED)
def test_what_could_not_be_used_is_not_compiled(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def compiler(*args: Any, **options: Any) -> None:
        attempts.append(args)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiler)
    take_away(name, monkeypatch)
    with pytest.raises(RuntimeError, match=lacks(name)):
        torch_private.compile_ahead("a graph", BytesIO(), {})  # type: ignore[arg-type]
    assert not attempts
    if name != torch_private._COMPILE:
        with pytest.raises(RuntimeError, match=lacks(name)):
            torch_private.load_compiled(tmp_path / "kernel.pt2", -1)


@pytest.mark.slow
def test_without_the_compiler_decoding_warns_once_and_gives_the_same(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_away(torch_private._LOAD, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = compile_sparse(decoder, PLAN)
    tokens = torch.arange(7)[None]
    reader = model.engine.open(1, 7, PLAN)
    found = [reader.read(tokens[:, :4])]
    with pytest.warns(UserWarning, match="runs uncompiled, more slowly: torch .* has no") as seen:
        model.warm_up()
    assert len(seen) == 1
    found += [reader.read(tokens[:, at : at + 1]) for at in range(4, 7)]  # warns no more
    expected = decoder(tokens, PLAN).logits[0, 3:]
    torch.testing.assert_close(torch.cat(found), expected)
    with pytest.raises(CannotCompile, match=r"has no torch\._inductor\.aoti_load_package, which"):
        model.export_step(tmp_path / "step.pt2")


def take_away(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, _, last = name.rpartition(".")
    monkeypatch.delattr(attrgetter(owner)(torch), last)
