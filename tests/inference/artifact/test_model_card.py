"""The card that people read: units, per cent, three digits, plans in words, the frontier."""

from pathlib import Path
from typing import Any

import pytest

from lightning_dsmoe.inference.artifact.certificate import save_certificate
from lightning_dsmoe.inference.compilation import load_sparse
from lightning_dsmoe.inference.sparse_model import SparseModel


@pytest.fixture
def model(float_artifact: Path) -> SparseModel:
    return load_sparse(float_artifact)


@pytest.mark.parametrize(
    ("gap", "interval", "line"),
    [
        (-0.0005, [-0.0008, -0.0003], "0.05 % below all experts (95 % interval 0.03 to 0.08 %)"),
        (0.0123456, (0.01, 0.02), "1.23 % above all experts (95 % interval 1 to 2 %)"),
        (1e-5, [-1e-4, 2e-4], "0.001 % above all experts (95 % interval 0.01 % below to 0.02 % ab"),
        (0.5, None, "50 % above all experts\n- predicted tokens: 12,345\n"),
    ],
)
def test_the_loss_against_all_experts(
    gap: float, interval: Any, line: str, model: SparseModel
) -> None:
    measured = {"sparse_loss": 1.41149, "relative_gap": gap, "relative_gap_95": interval}
    card = model.card(measured | {"tokens": 12345})
    assert f"\n- loss 1.411 nats per token, {line}" in card
    assert "relative" not in card


def test_units_and_digits(model: SparseModel) -> None:
    card = model.card(
        {
            "format_version": 1,
            "dense_loss": 1.4122,
            "active_share_mean": 0.273456,
            "kl": 0.000123456,
            "mine_too": 12345.6,
            "routing_agreement": None,
            "is_new": True,
            "data": {"val_fraction": 0.05, "context": 1024},
        }
    )
    measured = card.partition("## Measured\n\n")[2].partition("\n\n")[0]
    assert measured.splitlines() == [
        "- active share of the hidden parameters, mean over tokens: 27.3 %",
        "- loss of all experts: 1.412 nats per token",
        "- KL divergence from all experts, mean over tokens: 0.000123 nats",
        "- mine too: 12,346",
        "- is new: True",
    ]
    _, _, provenance = card.partition("### Provenance\n\n<details>")
    assert "\n\n- text, validation split: 5 %\n- text, context length: 1,024\n\n</" in provenance


def test_no_more_digits_than_people_read(model: SparseModel) -> None:
    measured = {"sparse_loss": 4.4551768, "relative_gap": 5.3e-10, "kl": 3.99e-15, "mine": 0.0}
    nothing = {"error_mean": 0.0, "error_max": 0.0}
    card = model.card(measured | {"relative_gap_95": [2e-11, 1e-9], "experts": [nothing] * 2})
    assert "\n- loss 4.455 nats per token, <0.001 % above all experts\n" in card
    assert "over tokens: <0.000001 nats\n- mine: 0\n" in card
    assert "###" not in card  # no layer changes, and nothing is known of the text
    changed = model.card({"experts": [nothing, nothing | {"error_mean": 0.25}]})
    assert "### Layers" in changed
    assert "| 1 | 25 | 0 |" in changed


def test_folded_sections_are_replaced_with_the_rest(model: SparseModel, tmp_path: Path) -> None:
    path = tmp_path / "model"
    model.save(path, certificate={"date": "then", "experts": [{"error_mean": 0.5}]})
    assert "then" in (path / "README.md").read_text()
    save_certificate(path, model, {"date": "now"})
    card = (path / "README.md").read_text()
    assert "then" not in card
    assert (card.count("### Provenance"), card.count("### Layers")) == (1, 0)
    assert card.count("## Use") == 1


def test_the_frontier_is_shown_where_it_is(model: SparseModel, tmp_path: Path) -> None:
    picture, path = tmp_path / "sweep.png", tmp_path / "model"
    picture.write_bytes(b"a picture")
    shown = "![Loss against active share of other plans](frontier.png)"
    model.save(path)
    assert shown not in (path / "README.md").read_text()
    model.save(path, frontier=picture)
    assert shown in (path / "README.md").read_text()
    assert (path / "frontier.png").read_bytes() == b"a picture"
    save_certificate(path, model, {"tokens": 3})
    assert (path / "README.md").read_text().count(shown) == 1
    load_sparse(path)
    with pytest.raises(FileNotFoundError):
        model.save(path, frontier=tmp_path / "absent.png")
    picture.write_bytes(b"another")
    with pytest.raises(ValueError, match="JSON"):
        model.save(path, frontier=picture, certificate={"loss": float("nan")})
    assert (path / "frontier.png").read_bytes() == b"a picture"
    model.save(path, frontier=path / "frontier.png")
    assert (path / "frontier.png").read_bytes() == b"a picture"
    model.save(path)  # perhaps another model, whose frontier this is not
    assert shown not in (path / "README.md").read_text()
    assert not (path / "frontier.png").exists()


def test_values_of_any_kind_are_told_as_they_are(model: SparseModel) -> None:
    """A certificate of one's own is any plain data."""
    rows = [{"error_mean": None, "by": "me"}, None]
    interval = {"sparse_loss": 1.5, "relative_gap": 0.1, "relative_gap_95": [None, None]}
    card = model.card({"experts": rows, 7: "seven", "huge": 10**400, **interval})
    assert "| 0 | None | me |" in card
    assert "- 7: seven\n" in card
    assert "10 % above all experts\n" in card
    assert f"- huge: {10**400:,}" in card
