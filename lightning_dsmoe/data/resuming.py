"""What a checkpoint says of its data: whether a run has the same, and where it goes on."""

from collections.abc import Mapping
from typing import Any

from lightning_dsmoe.data.position import Position, Share
from lightning_dsmoe.reading import Count, Size, check_json, shown

_POSITION = {"ranks": Size, "batch_size": Size, "epoch": Count, "batches": Count, "windows": Count}


def saved_position(saved: Mapping[str, Any]) -> tuple[Position, Share]:
    """Return the position of a checkpoint in the text, and how windows were dealt out.

    Args:
        saved: What the checkpoint holds of its data.

    Raises:
        ValueError: If it is damaged.

    Examples:
        >>> saved_position({"ranks": 2, "batch_size": 4, "epoch": 1, "batches": 5})
        (Position(epoch=1, batches=5, windows=40), Share(ranks=2, batch_size=4))
    """
    known = {name: saved[name] for name in _POSITION if name in saved}
    kind = {name: each for name, each in _POSITION.items() if name in known or name != "windows"}
    check_json("the checkpoint's position in the text", known, kind)
    share = Share(known["ranks"], known["batch_size"])
    # Checkpoints of version 0.1 count batches alone.
    windows = known.get("windows", known["batches"] * share.windows)
    return Position(known["epoch"], known["batches"], windows), share


def check_same_data(saved: Mapping[str, Any], now: Mapping[str, Any], *, fitting: bool) -> None:
    """Refuse a checkpoint of other data: its position would be one in another text.

    Args:
        saved: What the checkpoint holds of its data.
        now: The same of this run.
        fitting: Whether training goes on; elsewhere only the tokenizer has to agree.

    Raises:
        ValueError: In one line, with every difference and what to do.

    Examples:
        >>> check_same_data({"context": 8, "seed": 1}, {"context": 16, "seed": 1}, fitting=False)
        >>> check_same_data({"tokenizer": {"kind": "byte"}}, {"tokenizer": None}, fitting=False)
        Traceback (most recent call last):
        ...
        ValueError: the checkpoint was made with other data settings: tokenizer was 'byte', is None
    """
    differences = [
        f"{name} was {_in_words(saved.get(name), value)}, is {_in_words(value)}"
        for name, value in now.items()
        if (fitting or name == "tokenizer") and saved.get(name) != value
    ]
    if not differences:
        return
    way_out = ""
    if any(difference.startswith("train_tokens") for difference in differences):
        way_out = " (of other files, val_fraction or test_fraction)"
    if fitting:
        way_out += (
            ". Resume with the same data, or begin a new run with its weights: "
            "DSMoELanguageModel.load_from_checkpoint, then fit without ckpt_path"
        )
    raise ValueError(
        f"the checkpoint was made with other data settings: {'; '.join(differences)}{way_out}"
    )


def _in_words(value: object, other: object = None) -> str:
    words = _kind(value)
    return f"another {words}" if other is not None and _kind(other) == words else words


def _kind(value: object) -> str:
    if not isinstance(value, dict):
        return shown(value)
    alphabet = value.get("alphabet")
    vocabulary = f" of {len(alphabet)} characters" if isinstance(alphabet, str) else ""
    return f"{shown(value.get('kind'))}{vocabulary}"
