"""The compiled decode step against the same parts uncompiled and against the plain decoder."""

import copy
import os
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import FeedForwardLayer
from lightning_dsmoe.inference import Remaining, SparseModel, compile_sparse, generate, prune
from lightning_dsmoe.inference.engine.decode import compiled_step as compiled_module
from lightning_dsmoe.inference.engine.decode.aot_cache import Part, export_part, kernel_path
from lightning_dsmoe.inference.engine.decode.compiled_step import (
    CannotCompile,
    CompiledStep,
    compiling,
)
from lightning_dsmoe.inference.engine.decode.step import PredictStep
from lightning_dsmoe.inference.engine.engine import Engine
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.routing import (
    AllExperts,
    MixtureOutput,
    Selection,
    SelectionPlan,
    Threshold,
    TopK,
    TopP,
)

from ..conftest import (
    MakeDecoder,
    V,
    assert_near,
    in_steps,
    learned_positions_glu,
    packed,
    rotary_mlp,
    token_by_token,
    uniform,
    unlike_layers,
)

pytestmark = pytest.mark.slow

# torch 2.13 warns about its own modules when it compiles.

TOP_K = SelectionPlan.of_blocks((TopK(2), TopK(1, renormalize=True)), (TopK(1), TopK(2)))
SWAPPED = SelectionPlan.of_blocks((TopK(1, renormalize=True), TopK(2)), (TopK(2), TopK(1)))
THRESHOLDS = SelectionPlan(experts=Threshold(0.8), attention=TopP(0.6))
# All of them, by the way of the best few: in half precision, near ties would be decided by chance.
EVERYONE = SelectionPlan(experts=TopK(5), attention=TopK(3))


def pruned_mlp() -> Decoder:
    """Layers of different sizes under the same selections."""
    return prune(rotary_mlp(), Remaining(((0, 3, 4), (2,)), (None, (0, 2))))


class Variant(NamedTuple):
    """A model to compile, and how near to the plain decoder its logits are, relatively."""

    make: Callable[[], Decoder]
    plan: SelectionPlan
    starts: list[int]
    int8: bool = False
    dtype: torch.dtype = torch.float32
    near: float = 4e-6


VARIANTS = {
    "top k": Variant(rotary_mlp, TOP_K, [0]),
    "threshold, padded, pruned": Variant(pruned_mlp, THRESHOLDS, [0, 5, 8]),
    "8 bits": Variant(learned_positions_glu, uniform(TopK(2)), [0], int8=True),
    # The parts of unlike layers are compared uncompiled in test_step.py; here they are compiled.
    "layers that differ, padded": Variant(unlike_layers, THRESHOLDS, [0, 8]),
    "half": Variant(rotary_mlp, EVERYONE, [0], dtype=torch.bfloat16, near=3e-2),
}


@pytest.fixture(autouse=True)
def as_usual() -> None:
    """Compile what people compile: deterministic mode makes other graphs."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def long_tokens() -> Tensor:
    return torch.randint(V, (3, 80), generator=torch.Generator().manual_seed(8))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise FileNotFoundError("no C++ compiler\n  was found")

    monkeypatch.setattr(compiled_module.aot_cache, "compile_kernel", fail)


@pytest.fixture
def no_kernels(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def drawn(model: SparseModel | Engine | Decoder, prompt: Tensor, **options: Any) -> Tensor:
    """Samples that are the same if the probabilities are."""
    engine = model.engine if isinstance(model, SparseModel) else model
    if isinstance(engine, Engine):
        engine.warm_up(options.get("plan", getattr(model, "plan", None)), len(prompt))
    write = model.generate if isinstance(model, SparseModel) else partial(generate, model)
    return write(prompt, 20, generator=torch.Generator().manual_seed(3), **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_uncompiled_steps(name: str, long_tokens: Tensor) -> None:
    make, plan, starts, int8, dtype, near = VARIANTS[name]
    decoder, tokens = make().to(dtype), long_tokens[: len(starts)]
    twin = packed(decoder, int8=int8)
    padded = torch.arange(9) >= torch.tensor(starts)[:, None]
    mask = padded if len(starts) > 1 else None
    engine = Engine(twin, SwitchPoints())
    engine.warm_up(plan, len(starts))
    context = engine.open(*tokens.shape, plan)
    context.read(tokens[:, :9], mask)
    found = torch.stack([context.read(tokens_B1) for tokens_B1 in tokens[:, 9:].split(1, 1)], 1)
    assert isinstance(engine.compiled_step(plan, len(starts)), CompiledStep)
    assert found.shape[1] > 70
    assert_near(found, in_steps(twin, plan, tokens, 9, mask), near)
    plain = twin if int8 else decoder
    assert_near(found, token_by_token(plain, plan, tokens, 9, mask)[:, 9:], near)


@pytest.fixture(scope="module")
def kernels() -> None:
    """Have the kernels of one sequence under TOP_K and SWAPPED, which are the same ones."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.", FutureWarning)
        # By an engine, which has short rows in tiles: row-major weights would have other kernels.
        step = Engine(packed(rotary_mlp()), SwitchPoints()).compiled_step(TOP_K, 1)
    assert isinstance(step, CompiledStep)


@pytest.mark.slow
def test_another_model_of_these_sizes_finds_the_kernels(
    kernels: None, no_compiler: None, long_tokens: Tensor
) -> None:
    decoder, prompt = rotary_mlp(), long_tokens[:1, :4]
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1.25)
    model = compile_sparse(decoder, TOP_K)
    found = drawn(model, prompt)
    assert isinstance(model.engine.compiled_step(TOP_K, 1), CompiledStep)
    assert torch.equal(found, drawn(decoder, prompt, plan=TOP_K))
    assert not torch.equal(found, drawn(compile_sparse(rotary_mlp(), TOP_K), prompt))


@pytest.mark.slow
def test_tokens_of_any_whole_type(kernels: None, no_compiler: None, long_tokens: Tensor) -> None:
    model, prompt = compile_sparse(rotary_mlp(), TOP_K), long_tokens[:1, :4]
    expected = drawn(model, prompt)
    assert torch.equal(drawn(model, prompt.int()), expected.int())
    assert isinstance(model.engine.compiled_step(TOP_K, 1), CompiledStep)


@pytest.mark.slow
def test_a_damaged_kernel_is_made_anew(
    kernels: None, long_tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(os.environ["XDG_CACHE_HOME"])
    shutil.copytree(cache / "lightning_dsmoe", tmp_path / "lightning_dsmoe")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    twin, prompt = packed(rotary_mlp()), long_tokens[:1, :4]
    expected = drawn(Engine(twin, SwitchPoints()), prompt, plan=TOP_K)
    with compiling():
        part = Part(PredictStep(twin), (torch.zeros(1, twin.d_model),), frozenset())
        path = kernel_path(export_part(part))
    path.write_bytes(path.read_bytes()[:1000])
    others = {
        other: other.stat().st_mtime_ns for other in path.parent.glob("*.pt2") if other != path
    }
    assert torch.equal(drawn(Engine(twin, SwitchPoints()), prompt, plan=TOP_K), expected)
    assert path.stat().st_size > 1000
    assert {other: other.stat().st_mtime_ns for other in others} == others


@pytest.mark.slow
def test_a_plan_of_the_call_has_a_step_of_its_own(
    kernels: None, no_compiler: None, long_tokens: Tensor
) -> None:
    decoder, prompt = rotary_mlp(), long_tokens[:1, :7]
    model = compile_sparse(decoder, TOP_K)
    for plan in (SWAPPED, TOP_K, SWAPPED):
        expected = drawn(decoder, prompt, plan=plan)
        assert torch.equal(drawn(model, prompt, plan=plan), expected)
    assert torch.equal(drawn(model, prompt), drawn(model, prompt, plan=TOP_K))
    assert not torch.equal(drawn(model, prompt), drawn(model, prompt, plan=SWAPPED))
    steps = [model.engine.compiled_step(plan, 1) for plan in (TOP_K, SWAPPED)]
    assert None not in steps
    assert steps[0] is not steps[1]


@pytest.mark.slow
def test_contexts_in_turns_share_a_step_and_nothing_else(
    kernels: None, long_tokens: Tensor
) -> None:
    engine = Engine(packed(rotary_mlp()), SwitchPoints())
    engine.warm_up(TOP_K, 1)
    expected = [token_by_token(rotary_mlp(), TOP_K, row[None], 0) for row in long_tokens[:2, :20]]
    contexts = [engine.open(1, 20, TOP_K) for _ in expected]
    for at in range(20):
        for row, context in enumerate(contexts):
            logits = context.read(long_tokens[row : row + 1, at : at + 1])
            assert_near(logits, expected[row][:, at], 3e-6)


@pytest.mark.slow
def test_a_model_that_has_generated_can_be_copied(kernels: None, long_tokens: Tensor) -> None:
    model = compile_sparse(rotary_mlp(), TOP_K)
    expected = drawn(model, long_tokens[:1, :4])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(drawn(twin, long_tokens[:1, :4]), expected)


def test_without_a_compiler_it_gives_the_same_and_warm_up_says_so(
    no_compiler: None, no_kernels: None, long_tokens: Tensor
) -> None:
    decoder = rotary_mlp()
    model = compile_sparse(decoder, TOP_K)
    message = "decoding of {} runs uncompiled, more slowly: no C\\+\\+ compiler was found"
    for n, sequences in (1, "1 sequence"), (1, "1 sequence"), (2, "2 sequences"):
        prompts = long_tokens[:n, :6]
        with pytest.warns(UserWarning, match=message.format(sequences)):
            found = drawn(model, prompts)
        assert torch.equal(found, drawn(decoder, prompts, plan=TOP_K))
        again = model.generate(prompts, 20, generator=torch.Generator().manual_seed(3))
        assert torch.equal(again, found)  # here a warning is an error


def test_a_folder_that_others_can_write_to_is_not_used(
    no_compiler: None, no_kernels: None, long_tokens: Tensor
) -> None:
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "lightning_dsmoe" / "kernels"
    folder.mkdir(parents=True)
    message = f"uncompiled, more slowly: {folder} is not yours alone to write to"
    folder.chmod(0o777)
    model = compile_sparse(rotary_mlp(), TOP_K)
    with pytest.warns(UserWarning, match=message):
        found = drawn(model, long_tokens[:1, :6])
    assert torch.equal(found, drawn(rotary_mlp(), long_tokens[:1, :6], plan=TOP_K))


class Doubling(FeedForwardLayer):
    def forward(self, x: Tensor, selection: Selection = AllExperts()) -> MixtureOutput:
        return MixtureOutput(2 * x, None)


def test_a_layer_of_somebodys_own_runs_uncompiled(
    make_decoder: MakeDecoder, long_tokens: Tensor
) -> None:
    decoder, plan, prompt = make_decoder(), uniform(TopK(1)), long_tokens[:1, :6]
    decoder.blocks[1].feed_forward = Doubling()
    engine = Engine(packed(decoder), SwitchPoints())
    with pytest.raises(CannotCompile, match="a Doubling has no decode step of its own"):
        CompiledStep(engine.decoder, plan, 1)
    with pytest.warns(UserWarning, match="uncompiled, more slowly: a Doubling has no decode step"):
        found = drawn(engine, prompt, plan=plan)
    assert torch.equal(found, drawn(decoder, prompt, plan=plan))
