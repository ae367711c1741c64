"""Graphs with their weights as inputs, and where their kernels are kept."""

import contextlib
import copy
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import BadZipFile, ZipFile

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.engine.cache import DecoderCache
from lightning_dsmoe.inference.engine.decode import aot_cache as kernels_module
from lightning_dsmoe.inference.engine.decode import compiled_step as compiled
from lightning_dsmoe.inference.engine.decode.aot_cache import (
    Part,
    compile_kernel,
    ensure_private_folder,
    export_part,
    kernel_path,
    load_kernel,
    tensors_of,
)
from lightning_dsmoe.inference.engine.decode.compiled_step import CompiledStep
from lightning_dsmoe.inference.engine.decode.expert_choice import choose_experts
from lightning_dsmoe.inference.engine.decode.step import BlockStep, EmbedStep, PredictStep
from lightning_dsmoe.routing import Routing, Selection, Threshold, TopK

from ..conftest import assert_near, packed, rotary_mlp, uniform

pytestmark = pytest.mark.slow

PROGRAM = """
from functools import partial
import torch
from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts, TopK
from lightning_dsmoe.inference.engine.decode.aot_cache import Part, export_part, kernel_path
from lightning_dsmoe.inference.engine.weights.packing import pack
from lightning_dsmoe.inference.engine.decode.step import BlockStep

attention = partial(MixtureOfAttentionHeads, n_experts=3, n_heads=2, d_head=4, rope_theta=None)
feed_forward = partial(MixtureOfExperts, n_experts=5, d_expert=6)
decoder = Decoder(9, 8, 1, attention=attention, feed_forward=feed_forward).requires_grad_(False)
pack(decoder)
cache = torch.zeros(64, 2, 2, 4)
inputs = (torch.zeros(2, 8), cache, cache.clone(), torch.ones(64, 2).bool(), torch.tensor([3]))
part = Part(BlockStep(decoder.blocks[0], TopK(2), TopK(1)), inputs, frozenset({1, 2, 3}))
print(kernel_path(export_part(part)))
"""

FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from torch.export.pt2_archive._package import PT2ArchiveWriter
from lightning_dsmoe.inference.engine.decode.aot_cache import compile_kernel

def compiler(program, *, package_path, **options):
    with PT2ArchiveWriter(package_path) as writer:
        writer.write_bytes("code", bytes(1_000_000))

torch._inductor.aoti_compile_and_package = compiler
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    compile_kernel("a graph", Path(sys.argv[1]))
except OSError as error:
    print(error)
"""
LOADED = SimpleNamespace(loader=SimpleNamespace(boxed_run=print))


def package(path: Path) -> None:
    with ZipFile(path, "w") as archive:
        archive.writestr("kernel.so", b"machine code")


def inputs_of(decoder: Decoder, n_sequences: int) -> tuple[Tensor, ...]:
    slots = DecoderCache(decoder, n_sequences, 64).next_slots()
    x_BD, *by = EmbedStep(decoder)(torch.arange(n_sequences), slots.seen_SB)
    return x_BD, slots.keys[0], slots.values[0], slots.seen_SB, slots.at_1, *by


def block_part(decoder: Decoder, chosen: Selection, n_sequences: int, block: int = 0) -> Part:
    step = BlockStep(decoder.blocks[block], chosen, chosen)
    return Part(step, inputs_of(decoder, n_sequences), frozenset({1, 2, 3}))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return packed(rotary_mlp())


@pytest.fixture(scope="module")
def top_k(decoder: Decoder) -> ExportedProgram:
    with torch.no_grad():
        return export_part(block_part(decoder, TopK(2), 1))


@torch.no_grad()
def test_a_graph_takes_its_weights_as_inputs(decoder: Decoder, top_k: ExportedProgram) -> None:
    for block, size in ((0, 64), (1, 64), (1, 100)):
        step = BlockStep(decoder.blocks[block], TopK(2), TopK(2))
        x_BD, _, _, _, at_1, *by = inputs_of(decoder, 1)
        keys, values = torch.randn(2, size, 1, 2, 8)
        inputs = (x_BD, keys, values, torch.ones(size, 1, dtype=torch.bool), at_1, *by)
        found = top_k.module()(copy.deepcopy(inputs), tensors_of(step))
        assert_near(found, step(*inputs), 1e-6)


def test_weights_have_one_order(decoder: Decoder) -> None:
    for module in (EmbedStep(decoder), PredictStep(decoder)):
        names = [*dict(module.named_parameters()), *dict(module.named_buffers())]
        for name, tensor in zip(names, tensors_of(module), strict=True):
            assert tensor is module.get_parameter(name)
    first, second = (BlockStep(block, TopK(1), TopK(1)) for block in decoder.blocks)
    assert [t.shape for t in tensors_of(first)] == [t.shape for t in tensors_of(second)]


@torch.no_grad()
def test_blocks_that_differ_in_their_weights_alone_share_a_kernel(
    decoder: Decoder, top_k: ExportedProgram
) -> None:
    other = export_part(block_part(decoder, TopK(2), 1, block=1))
    assert kernel_path(other) == kernel_path(top_k)


@torch.no_grad()
def test_blocks_of_other_types_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = packed(rotary_mlp())
    router = decoder.blocks[1].feed_forward.router
    router.weight = nn.Parameter(router.weight.bfloat16(), requires_grad=False)
    monkeypatch.setattr(compiled, "kernels_of", lambda parts, *_: dict.fromkeys(parts, len(parts)))
    [(first, *_), (second, *_)] = CompiledStep(decoder, uniform(TopK(1)), 1)._blocks
    assert first == second == 4  # the embedding, two kinds of blocks, and the head


class Choosing(nn.Module):
    """What blocks differ in under different selections, as a graph of its own that is small."""

    def __init__(self, selection: Selection) -> None:
        super().__init__()
        self.selection = selection

    def forward(self, logits: Tensor) -> Tensor:
        return choose_experts(self.selection, Routing(logits, logits.softmax(-1))).gates_KB


@torch.no_grad()
def test_what_a_kernel_depends_on(
    decoder: Decoder, top_k: ExportedProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    selections = [TopK(1), TopK(2), TopK(2, renormalize=True), Threshold(0.8), Threshold(0.9)]
    square = torch.zeros(4, 4)
    parts = [
        block_part(packed(rotary_mlp(), int8=True), TopK(2), 1),
        *(Part(Choosing(some), (torch.zeros(1, 5),), frozenset()) for some in selections),
        *(Part(Choosing(TopK(2)), (torch.zeros(n, 5),), frozenset()) for n in (2, 3)),
        *(Part(nn.Linear(4, width), (square,), frozenset()) for width in (5, 6)),
        Part(nn.Linear(4, 5), (square.mT,), frozenset()),
        Part(nn.Linear(4, 5), (square,), frozenset({0})),
        Part(nn.Linear(4, 5).bfloat16(), (square.bfloat16(),), frozenset()),
    ]
    paths = [kernel_path(top_k), *(kernel_path(export_part(part)) for part in parts)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    paths.append(kernel_path(top_k))
    monkeypatch.setitem(kernels_module.OPTIONS, "cpp.simdlen", 256)
    paths.append(kernel_path(top_k))
    monkeypatch.setattr(torch, "__version__", "9.9")
    paths.append(kernel_path(top_k))
    monkeypatch.setattr(kernels_module, "_processor", lambda: "another one")
    paths.append(kernel_path(top_k))
    assert len(set(paths)) == len(parts) + 5


def test_a_kernel_is_found_again_by_another_process() -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(PROGRAM, {})
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert other.stdout == out.getvalue()
    assert other.stdout.endswith(".pt2\n")


def test_the_folder(
    top_k: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for own, expected in ((str(tmp_path / "own"), "own"), ("", ".cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", own)
        assert kernel_path(top_k).parent == tmp_path / expected / "lightning_dsmoe" / "kernels"
    assert not list(tmp_path.iterdir())


def test_a_kernel_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "down" / "kernel.pt2"

    def compiler(program: Any, *, package_path: Any, inductor_configs: dict[str, Any]) -> None:
        assert program == "a graph"
        assert inductor_configs == kernels_module.OPTIONS
        assert not path.exists()
        package_path.write(b"machine code")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiler)
    before = os.umask(0o002)
    try:
        ensure_private_folder(path.parent)
        compile_kernel("a graph", path)  # type: ignore[arg-type]
    finally:
        os.umask(before)
    assert path.read_text() == "machine code"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.parent.parent.stat().st_mode & 0o777 == 0o755


def test_folders_that_others_can_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir()
    ensure_private_folder(folder)
    for mode in (0o770, 0o707):
        folder.chmod(mode)
        with pytest.raises(PermissionError, match=r"kernels is not yours alone .* chmod go-w it"):
            ensure_private_folder(folder)
    folder.chmod(0o700)
    (tmp_path / "link").symlink_to(folder)
    ensure_private_folder(tmp_path / "link")
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    for place in (folder, tmp_path / "link"):
        with pytest.raises(PermissionError, match=r"not yours alone .* set XDG_CACHE_HOME to"):
            ensure_private_folder(place)
    monkeypatch.delattr(os, "getuid")  # as on Windows
    ensure_private_folder(folder)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "kernels"):
        with pytest.raises(PermissionError, match=r"cannot be kept in .*: set XDG_CACHE_HOME to"):
            ensure_private_folder(folder)


def test_code_that_others_may_have_written_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kernel.pt2"
    package(path)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *args, **options: LOADED)
    cpu = torch.device("cpu")
    for mode in (0o664, 0o646):
        path.chmod(mode)
        with pytest.raises(PermissionError, match=r"kernel\.pt2 is not yours alone to write to"):
            load_kernel(path, cpu)
    path.chmod(0o644)
    assert load_kernel(path, cpu) == LOADED.loader.boxed_run
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(PermissionError, match=r"kernel\.pt2 is not yours alone to write to"):
        load_kernel(path, cpu)


def test_damaged_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kernel.pt2"
    package(path)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *args, **options: LOADED)
    whole = path.read_bytes()
    at = whole.index(b"machine code")
    for damaged in (
        b"",
        whole[: len(whole) // 2],
        whole[:-1],
        whole[:at] + bytes(12) + whole[at + 12 :],
        bytes(len(whole)),
    ):
        path.write_bytes(damaged)
        with pytest.raises((ValueError, BadZipFile)):
            load_kernel(path, torch.device("cpu"))


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_compiler_that_fails_leaves_nothing_behind(
    earlier: bool, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kernels" / "kernel.pt2"
    if earlier:
        path.parent.mkdir()
        path.write_text("from another process")

    def compiler(program: Any, *, package_path: Any, **options: Any) -> None:
        package_path.write(b"half of the machine co")
        raise error("no more")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiler)
    with pytest.raises(error, match="no more"):
        compile_kernel("a graph", path)  # type: ignore[arg-type]
    assert list(path.parent.iterdir()) == ([path] if earlier else [])
    assert not earlier or path.read_text() == "from another process"


def test_a_full_disk_ends_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "kernel.pt2")]
    other = subprocess.run(command, capture_output=True, text=True)
    assert other.stdout == f"[Errno 27] File too large: '{tmp_path}'\n", other.stderr
    assert other.returncode == 0
    assert list(tmp_path.iterdir()) == []
