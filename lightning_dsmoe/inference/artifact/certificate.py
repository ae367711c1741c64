"""The certificate in an artifact: plain data with the hashes of the model it belongs to."""

from pathlib import Path
from typing import Any

from lightning_dsmoe.files import check_json_size, read_json
from lightning_dsmoe.folders import replaced_folder
from lightning_dsmoe.inference.artifact.directory import check_files, finish
from lightning_dsmoe.inference.artifact.hashes import CARD, CERTIFICATE, FRONTIER, SUMS
from lightning_dsmoe.inference.artifact.model_card import with_measured
from lightning_dsmoe.inference.sparse_model import SparseModel


def load_certificate(path: Path) -> Any:
    """The certificate of an artifact, JSON of any kind; None without one.

    Args:
        path: the artifact.

    Raises:
        ValueError: if the file is not JSON or too large.
    """
    return read_json(path / CERTIFICATE) if (path / CERTIFICATE).is_file() else None


def save_certificate(path: Path, model: SparseModel, certificate: dict[str, Any]) -> None:
    """Replace the certificate of an artifact and the measurements in its card, atomically.

    All other files and what people wrote in the card stay.

    Args:
        path: the artifact.
        model: the model in it.
        certificate: measurements of the model; plain data.

    Raises:
        FileNotFoundError: if there is no artifact.
        ValueError: if the certificate belongs to other files, or the card is no text.
    """
    check_files(path)
    # What a linked card links to, perhaps somebody's private file, is not copied into the artifact.
    if (path / CARD).is_file() and not (path / CARD).is_symlink():
        card = with_measured(
            _read_card(path / CARD), certificate, frontier=(path / FRONTIER).is_file()
        )
    else:
        card = model.card(certificate, frontier=(path / FRONTIER).is_file())
    with replaced_folder(path, is_ours={CERTIFICATE, CARD, SUMS}.__contains__) as folder:
        finish(folder, card=card, certificate=certificate)


def _read_card(path: Path) -> str:
    """The text of a card, which the sums do not cover: it may be anything."""
    check_json_size(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from None
