"""A sparse model is written whole or not at all, and never over something else."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.inference.artifact import directory as artifact_module
from lightning_dsmoe.inference.artifact.directory import read_artifact, write_artifact
from lightning_dsmoe.inference.compilation import compile_sparse
from lightning_dsmoe.routing import SelectionPlan

from ..conftest import CERTIFICATE, rotary_glu


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def save(
    path: Path,
    decoder: Decoder,
    *,
    card: str = "A card.",
    certificate: dict[str, Any] | None = None,
    **changes: Any,
) -> None:
    plan = SelectionPlan()
    model = compile_sparse(decoder, plan)
    config = {
        "architecture": model.architecture,
        "quantization": None,
        "quantize_head": False,
        "switch_points": model.switch_points._asdict(),
        "context": None,
        "tokenizer": None,
        **changes,
    }
    write_artifact(path, model.decoder, plan, config, card=card, certificate=certificate)


def failing(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fails", ["save_file", "_write_json", "hashes.sum_lines"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_save_that_fails_leaves_everything_as_it_was(
    fails: str,
    earlier: bool,
    one_decoder: Decoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "place" / "model"
    if earlier:
        save(path, one_decoder, certificate=CERTIFICATE)
        before = content(path)
    monkeypatch.setattr(f"{artifact_module.__name__}.{fails}", failing)
    with pytest.raises(OSError, match="No space left on device"):
        save(path, one_decoder)
    assert [file.name for file in path.parent.iterdir()] == (["model"] if earlier else [])
    if earlier:
        assert content(path) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_move_that_fails_brings_the_earlier_artifact_back(
    error: BaseException, one_decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    save(path, one_decoder, certificate=CERTIFICATE)
    before = content(path)
    rename = Path.rename

    def rename_once(self: Path, target: Path) -> Path:
        if target == path and not self.name.endswith(".old"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_once)
    with pytest.raises(type(error)):
        save(path, one_decoder)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert content(path) == before


def test_an_earlier_artifact_is_replaced_whole(one_decoder: Decoder, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "model"
    save(path, one_decoder, certificate=CERTIFICATE, card="First.")
    save(path, one_decoder, card="Second.")
    assert (path / "README.md").read_text() == "Second."
    assert not (path / "certificate.json").exists()
    assert [file.name for file in path.parent.iterdir()] == ["model"]
    assert path.stat().st_mode & 0o777 == 0o755
    read_artifact(path)


def test_files_that_are_no_part_of_it_stay(one_decoder: Decoder, tmp_path: Path) -> None:
    path = tmp_path / "model"
    save(path, one_decoder, certificate=CERTIFICATE)
    (path / ".git").mkdir()
    (path / ".git" / "README.md").write_text("history")
    (path / "notes.txt").write_text("mine")
    (path / "link").symlink_to("nowhere")
    save(path, one_decoder, card="Second.")
    assert (path / ".git" / "README.md").read_text() == "history"
    assert (path / "notes.txt").read_text() == "mine"
    assert (path / "link").is_symlink()
    assert (path / "README.md").read_text() == "Second."
    assert not (path / "certificate.json").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_something_else_in_the_way_is_kept(one_decoder: Decoder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("file", "folder", "empty"):
        with pytest.raises(FileExistsError, match=f"{name} exists and is not a sparse model"):
            save(tmp_path / name, one_decoder)
    assert (tmp_path / "folder" / "config.json").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, print])
def test_a_certificate_is_plain_data(value: object, one_decoder: Decoder, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match="JSON"):
        save(tmp_path / "model", one_decoder, certificate={"loss": value})
    assert list(tmp_path.iterdir()) == []


def lost(decoder: Decoder, value: float) -> Decoder:
    with torch.no_grad():
        decoder.blocks[1].attention_norm.weight[3] = value
    return decoder


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    ("decoder", "config", "message"),
    [
        (lost(rotary_glu(), float("nan")), {}, "blocks.1.attention_norm.weight holds NaN or inf"),
        (rotary_glu(), {"context": 0}, r"context must be null or .*, got 0"),
        (rotary_glu(), {"tokenizer": "gpt2"}, "tokenizer must be null or an object"),
        (rotary_glu(), {"tokenizer": {"a": "b" * 2**26}}, r"config\.json is larger than 67108864"),
        (rotary_glu(), {"surprise": 1}, "must have the fields"),
        (rotary_glu(), {"quantize_head": True}, "missing head.rows.weight"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_saved(
    decoder: Decoder, config: dict[str, Any], message: str, earlier: bool, tmp_path: Path
) -> None:
    path = tmp_path / "place" / "model"
    if earlier:
        save(path, rotary_glu(), certificate=CERTIFICATE)
        before = content(path)
    with pytest.raises(ValueError, match=message):
        save(path, decoder, **config)
    assert [file.name for file in path.parent.iterdir()] == (["model"] if earlier else [])
    if earlier:
        assert content(path) == before


def test_more_experts_than_can_be_loaded(tmp_path: Path) -> None:
    many = partial(MixtureOfExperts, n_experts=10_000, d_expert=1)
    with pytest.raises(ValueError, match="n_experts=10000 is out of range, 0 to 4096 is allowed"):
        save(tmp_path / "model", rotary_glu(feed_forward=many))
    assert list(tmp_path.iterdir()) == []
