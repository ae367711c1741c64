"""What a newer version wrote is refused in one line that names both formats, by every reader."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import save

from lightning_dsmoe import SelectionPlan, load_sparse
from lightning_dsmoe.analysis.certificate.reading import read_certificate
from lightning_dsmoe.data.token_file import read_tokens
from lightning_dsmoe.inference import load_decoder
from lightning_dsmoe.inference.artifact.hashes import sum_lines
from lightning_dsmoe.training.language_model import DSMoELanguageModel

GOLDEN = Path(__file__).parent
SPARSE = GOLDEN / "files_v0_1" / "sparse"


def put(path: Path, **fields: Any) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return path


def checkpoint(folder: Path, version: object) -> Path:
    content = torch.load(GOLDEN / "files_v0_1" / "checkpoint.ckpt", weights_only=True)
    torch.save(content | {"format_version": version}, folder / "model.ckpt")
    return folder / "model.ckpt"


def shards(folder: Path, version: object) -> Path:
    save({"state_dict": {"a.b": torch.ones(2)}}, checkpoint_id=folder / "model.ckpt")
    torch.save({"format_version": version}, folder / "model.ckpt" / "meta.pt")
    return folder / "model.ckpt"


def sparse(folder: Path, name: str, version: object) -> Path:
    path = folder / "sparse"
    shutil.copytree(SPARSE, path)
    put(path / name, format_version=version)
    (path / "SHA256SUMS").write_text("".join(sum_lines(path)))
    return path


def plan(folder: Path, version: object) -> Path:
    shutil.copy(GOLDEN / "files_v0_2" / "plan.json", folder)
    return put(folder / "plan.json", format_version=version)


def tokens(folder: Path, version: object) -> Path:
    shutil.copytree(GOLDEN / "files_v0_2" / "tokens", folder / "tokens")
    put(folder / "tokens" / "tokens.json", format_version=version)
    return folder / "tokens"


def certificate(folder: Path, version: object) -> Path:
    shutil.copy(SPARSE / "certificate.json", folder)
    return put(folder / "certificate.json", format_version=version)


READERS: dict[str, tuple[Callable[[Path, object], Path], Callable[[Path], object], int]] = {
    "checkpoint": (checkpoint, load_decoder, 1),
    "checkpoint of a LightningModule": (checkpoint, DSMoELanguageModel.load_from_checkpoint, 1),
    "folder of a sharded checkpoint": (shards, load_decoder, 1),
    "sparse model": (lambda *given: sparse(given[0], "config.json", given[1]), load_sparse, 2),
    "plan of it": (lambda *given: sparse(given[0], "plan.json", given[1]), load_sparse, 2),
    "plan": (plan, SelectionPlan.load, 2),
    "tokens": (tokens, read_tokens, 3),
    "certificate": (
        certificate,
        lambda path: read_certificate(str(path), json.loads(path.read_text())),
        1,
    ),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("name", READERS)
def test_newer_formats_are_refused(name: str, tmp_path: Path) -> None:
    forge, read, version = READERS[name]
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is compared below
        read(forge(tmp_path, version + 1))
    said = str(raised.value)
    assert "\n" not in said
    assert f" has format {version + 1}, this version reads {version}; a newer version" in said


@pytest.mark.parametrize("version", [True, 2.0, "2", None, [], 10**30, -1])
def test_what_is_no_format_is_refused(version: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"this version reads [12]; (a newer|an older|another) "):
        SelectionPlan.load(plan(tmp_path, version))
