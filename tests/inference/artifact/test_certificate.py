"""The certificate in an artifact: which files it is of, and no other change."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from lightning_dsmoe.files import sha256
from lightning_dsmoe.inference.artifact import directory as artifact_module
from lightning_dsmoe.inference.artifact.certificate import (
    load_certificate,
    save_certificate,
)
from lightning_dsmoe.inference.compilation import compile_sparse, load_sparse
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.inference.sparse_model import SparseModel
from lightning_dsmoe.routing import SelectionPlan, TopK

from ..conftest import rotary_glu, sign

ERRORS = {"dropped_mass_mean": 0.125, "bound_max": 0.5}
CERTIFICATE = {
    "kl": 0.01234567,
    "relative_gap_95": [-0.1, 0.1],
    "routing_agreement": None,
    "experts": [ERRORS, None],
    "attention": [None, None],
    "data": {"split": "val"},
}


@pytest.fixture
def model() -> SparseModel:
    return compile_sparse(rotary_glu(), SelectionPlan())


@pytest.fixture
def path(model: SparseModel, tmp_path: Path) -> Path:
    model.save(tmp_path / "model", certificate={"loss": 1.25})
    return tmp_path / "model"


def content(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_a_certificate_tells_its_files(path: Path, model: SparseModel) -> None:
    certificate = load_certificate(path)
    hashes = {name: sha256(path / name) for name in ("plan.json", "model.safetensors")}
    assert certificate["sha256"].keys() == {"config.json", *hashes}
    assert certificate == {"loss": 1.25, "sha256": certificate["sha256"] | hashes}
    model.switch_points = SwitchPoints(gather_up_to=3)
    model.save(path, certificate=certificate)
    load_sparse(path)
    model.save(path, certificate=certificate)
    assert load_certificate(path) == certificate
    model.save(path)
    assert load_certificate(path) is None


def test_a_certificate_of_another_model(path: Path, model: SparseModel, tmp_path: Path) -> None:
    certificate = load_certificate(path)
    others = (
        compile_sparse(rotary_glu(), model.plan),
        SparseModel(
            model.decoder,
            SelectionPlan(experts=TopK(2)),
            architecture=model.architecture,
        ),
    )
    for other, name in zip(others, ("model.safetensors", "plan.json"), strict=True):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ValueError, match="hash mismatch: this certificate belongs to another"):
            other.save(tmp_path / "other", certificate=certificate)
        with pytest.raises(ValueError, match="hash mismatch: this certificate belongs to another"):
            other.save(path, certificate=certificate)
        assert sorted(tmp_path.iterdir()) == before
        other.save(tmp_path / name)
        with pytest.raises(ValueError, match="hash mismatch: this certificate belongs to another"):
            save_certificate(tmp_path / name, other, certificate)
        assert load_certificate(tmp_path / name) is None


def test_other_files_beside_a_certificate_are_refused(
    path: Path, model: SparseModel, tmp_path: Path
) -> None:
    compile_sparse(rotary_glu(), SelectionPlan(experts=TopK(2)), tokenizer={"kind": "byte"}).save(
        tmp_path / "other"
    )
    for name, what in (
        ("model.safetensors", "other weights"),
        ("plan.json", "another plan"),
        ("config.json", "another configuration"),
    ):
        whole = (path / name).read_bytes()
        shutil.copy(tmp_path / "other" / name, path / name)
        sign(path)
        message = rf"model is certified for {what}: the SHA-256 of {name} is \w+, certificate\.json"
        with pytest.raises(ValueError, match=message):
            load_sparse(path)
        SparseModel.load(path, certified=False)
        (path / name).write_bytes(whole)
        sign(path)
    load_sparse(path)


@pytest.mark.parametrize("hashes", [None, [], "sha256", {}, {"config.json": 1}])
def test_certificates_with_other_hashes(hashes: object, path: Path) -> None:
    (path / "certificate.json").write_text(json.dumps({"sha256": hashes}))
    sign(path)
    with pytest.raises(ValueError, match="certified for another configuration"):
        load_sparse(path)


@pytest.mark.parametrize("certificate", [{"loss": 1.25}, {}, [], "sha256", None])
def test_certificates_without_hashes_are_no_reason_to_refuse(
    certificate: object, path: Path
) -> None:
    (path / "certificate.json").write_text(json.dumps(certificate))
    sign(path)
    load_sparse(path)


def test_a_new_certificate_changes_nothing_else(path: Path, model: SparseModel) -> None:
    (path / "pictures").mkdir()
    (path / "pictures" / "frontier.svg").write_text("<svg/>")
    card = (path / "README.md").read_text()
    (path / "README.md").write_text(card.replace("# A sparse", "# My sparse") + "\n## Thanks\n")
    before = content(path)
    save_certificate(path, model, CERTIFICATE)
    after = content(path)
    changed = {"certificate.json", "README.md", "SHA256SUMS"}
    assert {name for name in after if after[name] != before.get(name)} == changed
    assert after.keys() == before.keys()
    assert [each.name for each in path.parent.iterdir()] == ["model"]
    assert {k: v for k, v in load_certificate(path).items() if k != "sha256"} == CERTIFICATE
    load_sparse(path)
    card = (path / "README.md").read_text()
    assert "---\n\n# My sparse" in card
    assert card.endswith("\n## Thanks\n")
    assert "loss: 1.25" not in card
    lines = card.splitlines()
    assert lines.count("## Measured") == lines.count("## Use") == 1
    assert "tokens: 0.0123 nats\n- 95 % interval of that: -10 % to 10 %\n" in card
    assert "\n- text, split: val\n\n</details>\n" in card
    assert "| layer | dropped gate mass, mean, % | its bound, max, % |" in lines
    assert "| 0 | 12.5 | 50 |" in lines
    assert "routing_agreement" not in card
    assert "Attention experts:" not in card
    save_certificate(path, model, CERTIFICATE)
    assert (path / "README.md").read_text() == card


def test_cards_without_the_section_or_none(path: Path, model: SparseModel) -> None:
    (path / "README.md").write_text("My own words.")
    save_certificate(path, model, CERTIFICATE)
    assert (
        (path / "README.md")
        .read_text()
        .startswith("My own words.\n\n## Measured\n\n- KL divergence")
    )
    (path / "README.md").write_text("## Measured\n\n- old\n\n# Notes\n\nMine.\n")
    save_certificate(path, model, CERTIFICATE)
    card = (path / "README.md").read_text()
    assert card.endswith("\n\n# Notes\n\nMine.\n")
    assert "- old" not in card
    (path / "README.md").unlink()
    save_certificate(path, model, CERTIFICATE)
    assert (path / "README.md").read_text().count("---\n\n# A sparse DS-MoE language model\n") == 1


def test_a_card_elsewhere_is_not_copied(path: Path, model: SparseModel, tmp_path: Path) -> None:
    (tmp_path / "private.md").write_text("My own words.")
    (path / "README.md").unlink()
    (path / "README.md").symlink_to(tmp_path / "private.md")
    save_certificate(path, model, CERTIFICATE)
    assert not (path / "README.md").is_symlink()
    assert "My own words" not in (path / "README.md").read_text()
    assert (tmp_path / "private.md").read_text() == "My own words."


FAILING = [
    f"{artifact_module.__name__}._write_json",
    f"{artifact_module.__name__}.hashes.sum_lines",
    "lightning_dsmoe.folders.put_in_place",
]


@pytest.mark.parametrize("fails", FAILING)
def test_a_failure_leaves_everything_as_it_was(
    fails: str, path: Path, model: SparseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    before = content(path)
    monkeypatch.setattr(fails, failing)
    with pytest.raises(OSError, match="No space left"):
        save_certificate(path, model, CERTIFICATE)
    assert content(path) == before
    assert [each.name for each in path.parent.iterdir()] == ["model"]


def test_where_files_cannot_be_linked(
    path: Path, model: SparseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", failing)
    save_certificate(path, model, CERTIFICATE)
    load_sparse(path)
    assert "kl" in load_certificate(path)


def test_other_places(path: Path, model: SparseModel, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no sparse model at"):
        save_certificate(tmp_path / "absent", model, CERTIFICATE)
    (path / "certificate.json").write_text("{")
    with pytest.raises(ValueError, match=r"certificate\.json is not JSON"):
        load_certificate(path)
    (path / "certificate.json").write_text(json.dumps(CERTIFICATE))
    assert load_certificate(path) == CERTIFICATE


@pytest.mark.parametrize(
    ("card", "message"), [(b"\xff\xfe", "is not a text in UTF-8"), (None, "is larger than")]
)
def test_a_card_that_is_no_text_is_named(
    model: SparseModel, path: Path, card: bytes | None, message: str
) -> None:
    with (path / "README.md").open("wb") as file:
        file.write(card or b"")
        file.truncate(2**40 if card is None else len(card))
    with pytest.raises(ValueError, match=rf"README\.md {message}"):
        save_certificate(path, model, CERTIFICATE)
