"""The directory of a sparse model: whole, unchanged and plain data, or refused."""

import hashlib
import json
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_dsmoe.inference.artifact import read_artifact
from lightning_dsmoe.inference.compilation import compile_sparse
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.routing import SelectionPlan

from .conftest import learned_positions_mlp, rotary_glu

DATA = ("config.json", "plan.json", "model.safetensors")
CERTIFICATE = {"loss": 1.5, "tokens": 12}


def points(**changes: Any) -> dict[str, Any]:
    return SwitchPoints()._asdict() | changes


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    paths = {}
    torch.manual_seed(3)
    decoder, plan = rotary_glu(), SelectionPlan.uniform(2)
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


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_the_files(artifact: Path) -> None:
    assert sorted(content(artifact)) == sorted(
        ["README.md", "SHA256SUMS", "certificate.json", *DATA]
    )
    certificate = json.loads((artifact / "certificate.json").read_text())
    assert {name: certificate[name] for name in CERTIFICATE} == CERTIFICATE
    config = json.loads((artifact / "config.json").read_text())
    assert config["format_version"] == 2
    sums = (artifact / "SHA256SUMS").read_bytes()
    sign(artifact)
    assert (artifact / "SHA256SUMS").read_bytes() == sums


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_understands_the_sums(artifact: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    checked = subprocess.run(command, cwd=artifact, capture_output=True, text=True)
    assert checked.returncode == 0
    assert checked.stdout.splitlines() == sorted(f"{n}: OK" for n in ("certificate.json", *DATA))


def test_tied_weights_are_kept_once(artifact: Path, tmp_path: Path) -> None:
    names = load_file(artifact / "model.safetensors").keys()
    assert "embedding.weight" in names
    assert "head.weight" not in names
    decoder = read_artifact(artifact).decoder
    assert decoder.head.weight is decoder.embedding.weight
    untied = tmp_path / "untied"
    compile_sparse(learned_positions_mlp(), SelectionPlan.uniform(2)).save(untied)
    assert "head.weight" in load_file(untied / "model.safetensors")
    decoder = read_artifact(untied).decoder
    assert decoder.head.weight is not decoder.embedding.weight


def test_loaded_weights_do_not_hang_on_the_file(artifact: Path, tokens: Tensor) -> None:
    decoder = read_artifact(artifact).decoder
    expected = decoder(tokens).logits
    with (artifact / "model.safetensors").open("r+b") as file:
        file.write(bytes((artifact / "model.safetensors").stat().st_size))
    assert torch.equal(decoder(tokens).logits, expected)


@pytest.mark.parametrize("name", ["certificate.json", *DATA])
def test_a_flipped_bit_anywhere(name: str, artifact: Path) -> None:
    whole = (artifact / name).read_bytes()
    for at in (0, 7, len(whole) // 2, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        (artifact / name).write_bytes(flipped)
        with pytest.raises(ValueError, match=f"artifact was changed: .* SHA-256 of {name}$"):
            read_artifact(artifact)
    (artifact / name).write_bytes(whole)
    read_artifact(artifact)


def test_flipped_bits_of_the_sums(artifact: Path) -> None:
    whole = (artifact / "SHA256SUMS").read_bytes()
    for changed in (
        *(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 37)),
        b"",
        whole[:-1],
        whole + b"\n",
        whole[::-1],
        b"\xff" * len(whole),
    ):
        (artifact / "SHA256SUMS").write_bytes(changed)
        with pytest.raises(ValueError, match="artifact was changed: SHA256SUMS does not tell"):
            read_artifact(artifact)


@pytest.mark.parametrize("name", DATA)
def test_truncated_files(name: str, artifact: Path) -> None:
    whole = (artifact / name).read_bytes()
    for length in (0, 1, 8, len(whole) // 2, len(whole) - 1):
        (artifact / name).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"was changed: .* {name}$"):
            read_artifact(artifact)
        if length == len(whole) - 1 and name != "model.safetensors":
            continue  # only the last line end is gone
        sign(artifact)
        with pytest.raises(ValueError, match=f"{name} is not"):
            read_artifact(artifact)
        (artifact / name).write_bytes(whole)
        sign(artifact)


@pytest.mark.parametrize("name", ["SHA256SUMS", *DATA])
def test_missing_files(name: str, artifact: Path) -> None:
    (artifact / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"not a sparse model: {name} is missing"):
        read_artifact(artifact)


def test_other_places(artifact: Path) -> None:
    for path in (artifact / "absent", artifact / "config.json"):
        with pytest.raises(FileNotFoundError, match=r"no sparse model at .*: not a directory"):
            read_artifact(path)


def test_a_certificate_that_is_gone_is_missed_and_a_card_is_not(artifact: Path) -> None:
    (artifact / "README.md").write_text("My own words.")
    read_artifact(artifact)
    (artifact / "README.md").unlink()
    read_artifact(artifact)
    (artifact / "certificate.json").unlink()
    with pytest.raises(ValueError, match="artifact was changed"):
        read_artifact(artifact)


@pytest.mark.parametrize("name", ["config.json", "plan.json"])
@pytest.mark.parametrize(
    "garbage",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1} 2', b"\0" * 50, b"1" * 10_000],
    ids=["empty", "open", "latin", "deep", "more", "zeros", "digits"],
)
def test_garbage_for_json(name: str, garbage: bytes, float_artifact: Path) -> None:
    (float_artifact / name).write_bytes(garbage)
    sign(float_artifact)
    with pytest.raises(ValueError, match=f"{name} is not JSON"):
        read_artifact(float_artifact)


def test_an_endless_json(float_artifact: Path) -> None:
    with (float_artifact / "plan.json").open("r+b") as file:
        file.truncate(65 * 2**20)
    sign(float_artifact)
    with pytest.raises(ValueError, match=r"plan\.json is larger than 67108864 bytes"):
        read_artifact(float_artifact)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 3, r"has format 3, this version reads 2; another version of"),
        ("format_version", 1, "has format 1, this version reads 2"),
        ("format_version", "x" * 999, "has format 'x{0,19}, this version reads 2"),
        ("format_version", ..., "must be an object with a format_version"),
        ("context", ..., "must have the fields"),
        ("surprise", 1, "must have the fields"),
        ("quantization", "int4", "quantization must be null or int8, got 'int4'"),
        ("quantization", ["int8"], "quantization must be null or int8, got"),
        ("quantize_head", 1, "quantize_head must be true or false"),
        ("quantize_head", ..., "must have the fields"),
        ("switch_points", [8, 9, None], "switch_points must have the fields"),
        ("switch_points", {"gather_up_to": 8}, "switch_points must have the fields"),
        ("switch_points", points(gather_up_to=-1), "gather_up_to must be a whole .*, got -1"),
        ("switch_points", points(gather_up_to=True), "gather_up_to must be a whole .*, got True"),
        ("switch_points", points(grouped_from=9.0), "grouped_from must be a whole .*, got 9.0"),
        ("switch_points", points(measured_on=3), "measured_on must be null or a text"),
        ("context", 0, "context must be null or at least 1, got 0"),
        ("context", 8.5, r"context must be null or at least 1, got 8\.5"),
        ("tokenizer", "gpt2", "tokenizer must be null or an object, got 'gpt2'"),
        ("architecture", None, "an architecture is an object"),
        ("quantization", "int8", r"missing .*w_in\.scales; .*w_in\.weight is torch\.float32, not"),
        ("quantize_head", True, r"missing head\.rows\.weight; missing head\.rows\.scales$"),
    ],
)
def test_other_configurations(
    field: str, value: object, message: str, float_artifact: Path
) -> None:
    config = json.loads((float_artifact / "config.json").read_text()) | {field: value}
    config = {name: each for name, each in config.items() if each is not ...}
    (float_artifact / "config.json").write_text(json.dumps(config))
    sign(float_artifact)
    with pytest.raises(ValueError, match=message):
        read_artifact(float_artifact)


def test_eight_bit_weights_for_a_float_model(originals: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(originals["int8"], tmp_path / "artifact"))
    shutil.copy(originals["float"] / "config.json", path)
    sign(path)
    with pytest.raises(
        ValueError, match=r"unknown .*w_in\.scales; .*w_in\.weight is torch\.int8, not"
    ):
        read_artifact(path)


@pytest.mark.parametrize("wrong", ['["os.system"]', "3", "null"])
def test_configurations_that_are_no_objects(wrong: str, float_artifact: Path) -> None:
    for name, message in (("config.json", "must be an object"), ("plan.json", "is an object")):
        whole = (float_artifact / name).read_text()
        (float_artifact / name).write_text(wrong)
        sign(float_artifact)
        with pytest.raises(ValueError, match=message):
            read_artifact(float_artifact)
        (float_artifact / name).write_text(whole)


def test_a_plan_of_another_model(float_artifact: Path) -> None:
    SelectionPlan.uniform(3).save(float_artifact / "plan.json")
    sign(float_artifact)
    with pytest.raises(ValueError, match="a plan of 3 layers, a model of 2"):
        read_artifact(float_artifact)


def test_a_model_of_10_to_the_9_experts_is_refused_before_it_is_built(
    float_artifact: Path,
) -> None:
    config = json.loads((float_artifact / "config.json").read_text())
    config["architecture"]["feed_forward"]["init_args"]["n_experts"] = 10**9
    (float_artifact / "config.json").write_text(json.dumps(config))
    sign(float_artifact)
    with pytest.raises(ValueError, match="n_experts=1000000000 is out of range, 0 to 4096"):
        quickly(lambda: read_artifact(float_artifact))


def test_a_class_of_elsewhere_is_refused(float_artifact: Path) -> None:
    for path in ("os.system", "antigravity.Router"):
        config = json.loads((float_artifact / "config.json").read_text())
        config["architecture"]["feed_forward"]["class_path"] = path
        (float_artifact / "config.json").write_text(json.dumps(config))
        sign(float_artifact)
        with pytest.raises(ValueError, match=f"'{path}' is not a known FeedForwardLayer"):
            read_artifact(float_artifact)
    assert "antigravity" not in sys.modules


def quickly(action: Callable[[], object]) -> None:
    """Run something in less than a second and 200 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    try:
        action()
    finally:
        assert time.process_time() - start < 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def safetensors(header: object, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], offsets: list[int]) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FILES = {
    "no header": b"",
    "header of 200 MB that is not there": struct.pack("<Q", 200_000_000) + b"{}",
    "header without end": struct.pack("<Q", 2**64 - 1) + b"{}",
    "no JSON": safetensors(b"weights"),
    "a list": safetensors([1, 2]),
    "deep": safetensors(b"[" * 100_000),
    "negative offsets": safetensors({"a": entry("F32", [16], [-64, 0])}),
    "backwards": safetensors({"a": entry("F32", [16], [64, 0])}),
    "out of the file": safetensors({"a": entry("F32", [32], [0, 128])}),
    "overlap": safetensors({"a": entry("F32", [16], [0, 64]), "b": entry("F32", [8], [32, 64])}),
    "gap": safetensors({"a": entry("F32", [8], [0, 32]), "b": entry("F32", [4], [48, 64])}),
    "shape of another size": safetensors({"a": entry("F32", [17], [0, 64])}),
    "negative shape": safetensors({"a": entry("F32", [-16], [0, 64])}),
    "shape without end": safetensors({"a": entry("F32", [2**40, 2**40], [0, 64])}),
    "type of another size": safetensors({"a": entry("F64", [16], [0, 64])}),
    "unknown type": safetensors({"a": entry("F31", [16], [0, 64])}),
    "bytes left": safetensors({"a": entry("F32", [8], [0, 32])}),
}


@pytest.mark.parametrize("name", FILES)
def test_forged_weights_are_refused_quickly(name: str, float_artifact: Path) -> None:
    (float_artifact / "model.safetensors").write_bytes(FILES[name])
    sign(float_artifact)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        quickly(lambda: read_artifact(float_artifact))


def test_a_header_of_200_mb_is_refused_quickly(float_artifact: Path) -> None:
    with (float_artifact / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(200_000_008)
    sign(float_artifact)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        quickly(lambda: read_artifact(float_artifact))


def test_weights_of_another_model_are_refused_with_one_list(artifact: Path) -> None:
    def forge(**changes: Tensor | None) -> None:
        kept = {n: t for n, t in {**weights, **changes}.items() if t is not None}
        save_file(kept, artifact / "model.safetensors")
        sign(artifact)

    weights = load_file(artifact / "model.safetensors")
    norm, router = "blocks.1.attention_norm.weight", "blocks.0.feed_forward.router.weight"
    forge(**{norm: None, "extra": torch.zeros(1), router: torch.zeros(5, 16)})
    message = rf"missing {norm}; unknown extra; {router} is \(5, 16\), not \(4, 16\)$"
    with pytest.raises(ValueError, match=message):
        read_artifact(artifact)
    forge(**{norm: weights[norm].to(torch.int32)})
    with pytest.raises(ValueError, match=rf"{norm} is torch\.int32, not torch\.float32$"):
        read_artifact(artifact)
    forge(**{norm: weights[norm].to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=rf"{norm} is F8_E4M3, allowed are F64, F32, "):
        read_artifact(artifact)
    codes = "blocks.0.feed_forward.experts.w_in.weight"
    if weights[codes].dtype == torch.int8:
        for dtype in (torch.float32, torch.uint8):
            forge(**{codes: weights[codes].to(dtype)})
            with pytest.raises(ValueError, match=rf"{codes} is {dtype}, not torch\.int8$"):
                read_artifact(artifact)
    forge(**{norm: weights[norm].bfloat16()})
    assert read_artifact(artifact).decoder.get_parameter(norm).dtype == torch.bfloat16
