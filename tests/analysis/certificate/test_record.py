import json
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
import torch

from lightning_dsmoe.analysis import HeldOut
from lightning_dsmoe.analysis.certificate.judgement import Judgement, judge
from lightning_dsmoe.analysis.certificate.reading import read_certificate
from lightning_dsmoe.analysis.certificate.record import TextSource, certificate
from lightning_dsmoe.inference import compile_sparse
from lightning_dsmoe.routing import SelectionPlan, TopK

from ..conftest import make_decoder, make_text

HASHES = dict.fromkeys(("config.json", "plan.json", "model.safetensors"), "0" * 64)


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    decoder = make_decoder()
    text = make_text(decoder)
    plan = SelectionPlan(experts=TopK(2))
    judgement = judge(compile_sparse(decoder, plan), text)
    return certificate(judgement, text, TextSource("files", "test", 0.1, 0.2), checkpoint="ab")


@pytest.fixture
def written(made: dict[str, Any]) -> dict[str, Any]:
    """As it comes out of an artifact."""
    read: dict[str, Any] = json.loads(json.dumps({**made, "sha256": HASHES}, allow_nan=False))
    return read


def test_it_tells_what_it_takes_to_repeat_it(made: dict[str, Any], text: HeldOut) -> None:
    assert set(Judgement._fields) < set(made)
    assert made["data"] == {
        "source": "files",
        "split": "test",
        "val_fraction": 0.1,
        "test_fraction": 0.2,
        "context": 16,
        "batch_tokens": 32,
        "fingerprint": text.fingerprint(),
    }
    assert made["checkpoint_sha256"] == "ab"
    assert made["versions"]["torch"] == torch.__version__
    assert made["versions"]["python"] == platform.python_version()
    assert made["versions"]["lightning_dsmoe"]
    age = datetime.now(UTC) - datetime.fromisoformat(made["date"])
    assert 0 <= age.total_seconds() < 600


def test_what_was_written_is_read(written: dict[str, Any]) -> None:
    assert read_certificate("it", written) == written
    assert read_certificate("it", None) is None
    with pytest.raises(ValueError, match="it must be an object with a format_version"):
        read_certificate("it", {"loss": 1.25})


def put(*path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for name in path[:-1]:
            data = data[name]
        if value is ...:
            del data[path[-1]]
        else:
            data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format_version", value=2), "it has format 2, this version reads 1"),
        (put("format_version", value="x" * 999), "it has format 'x+[.]{3}x+', this version"),
        (put("kl", value=...), "it must have the fields format_version, tokens, "),
        (put("surprise", value=1), "it must have the fields format_version, tokens, "),
        (put("kl", value=float("nan")), "it: kl must be a finite number, got nan"),
        (put("kl", value=float("-inf")), "it: kl must be a finite number, got -inf"),
        (put("kl", value=True), "it: kl must be a finite number, got True"),
        (put("kl", value="0.1"), "it: kl must be a finite number, got '0.1'"),
        (put("kl", value=10**400), "it: kl must be a finite number, got 1000"),
        (put("dense_loss", value=None), "it: dense_loss must be a finite number, got None"),
        (put("tokens", value=-1), "it: tokens must be an integer from 0 to .*, got -1"),
        (put("tokens", value=1.5), r"it: tokens must be an integer from 0 to .*, got 1\.5"),
        (put("dense", value="mine"), "it: dense must be checkpoint or artifact, got 'mine'"),
        (put("dense", value=["mine"]), "it: dense must be checkpoint or artifact"),
        (put("relative_gap_95", value=[1]), "it: relative_gap_95 must be null or a list of 2, got"),
        (put("relative_gap_95", value=3), "it: relative_gap_95 must be null or a list of 2, got"),
        (put("experts", value=[{"bound": 1}]), r"it, experts\[0\] must have the fields dropped_"),
        (put("experts", value=[None] * 2000), "it: experts must be a list of length 0 to 1024"),
        (put("experts", value={}), "it: experts must be a list of length 0 to 1024, got {}"),
        (put("data", value=[]), r"it: data must be an object, got \[\]"),
        (put("data", "context", value=0), "data: context must be an integer from 1 .*, got 0"),
        (
            put("data", "context", value=10**19),
            "data: context must be an integer from 1 .*, got 1000",
        ),
        (
            put("data", "batch_tokens", value=-1),
            "it, data: batch_tokens must be an integer from 1 to .*, got -1",
        ),
        (put("data", "split", value="train"), "it, data: split must be val or test"),
        (put("data", "files", value="/etc/passwd"), "it, data must have the fields source, "),
        (put("data", "source", value="/dev/zero"), "source must be standard library or files or"),
        (
            put("data", "fingerprint", value="x" * 999),
            "it, data: fingerprint must be a string of len",
        ),
        (put("versions", value={}), "it, versions must have the fields"),
        (put("versions", "torch", value=2), "it, versions: torch must be a string .*, got 2"),
        (put("sha256", value=...), "it must have the fields"),
        (put("sha256", "plan.json", value=...), "it, sha256 must have the fields config.json, pl"),
        (put("sha256", "plan.json", value=1), "it, sha256: plan.json must be a string .*, got 1"),
        (put("date", value=None), "it: date must be a string .*, got None"),
        (put("checkpoint_sha256", value=3), "checkpoint_sha256 must be null or a str.*, got 3"),
    ],
)
def test_broken_certificates(
    change: Callable[[dict[str, Any]], None], message: str, written: dict[str, Any]
) -> None:
    change(written)
    with pytest.raises(ValueError, match=message) as raised:
        read_certificate("it", written)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("wrong", [3, "text", [], True])
def test_something_else(wrong: object) -> None:
    with pytest.raises(ValueError, match="it must be an object"):
        read_certificate("it", wrong)
