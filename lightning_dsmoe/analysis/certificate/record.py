"""The certificate of a sparse model: what was measured, on which text, of which files."""

import platform
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import torch

from lightning_dsmoe.analysis.certificate.judgement import Judgement
from lightning_dsmoe.analysis.held_out import HeldOut
from lightning_dsmoe.version import VERSION

FORMAT_VERSION = 1

Source = Literal["standard library", "files", "other"]


class TextSource(NamedTuple):
    """Where a text came from, without naming files.

    Args:
        source: "standard library" for the interpreter's Python sources, "files" for the user's,
            "other" for batches of something else.
        split: the part of the text, "val" or "test".
        val_fraction: share of the text in the validation split; None if unknown.
        test_fraction: share of the text in the test split; None if unknown.
    """

    source: Source
    split: Literal["val", "test"]
    val_fraction: float | None = None
    test_fraction: float | None = None


def certificate(
    judgement: Judgement, text: HeldOut, source: TextSource, *, checkpoint: str | None = None
) -> dict[str, Any]:
    """A judgement and what is needed to repeat it, as plain data.

    Writing it into an artifact adds `sha256`, the hashes of its plan, weights and configuration.

    Args:
        judgement: what was measured.
        text: the text that it was measured on.
        source: where the text came from.
        checkpoint: SHA-256 of the trained model's file, if known.
    """
    measured = judgement._asdict()
    for kind in ("experts", "attention"):
        measured[kind] = [None if each is None else each._asdict() for each in measured[kind]]
    first_BT, _ = text.batches[0]
    return {
        "format_version": FORMAT_VERSION,
        **measured,
        "data": {
            **source._asdict(),
            "context": first_BT.shape[1],
            "batch_tokens": first_BT.numel(),
            "fingerprint": text.fingerprint(),
        },
        "checkpoint_sha256": checkpoint,
        "versions": {
            "lightning_dsmoe": VERSION,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
