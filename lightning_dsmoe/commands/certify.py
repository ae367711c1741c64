"""The certificate of a sparse model: made, or checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lightning_dsmoe.analysis import HeldOut
from lightning_dsmoe.analysis.certificate.check import (
    ROUNDING,
    check_weights,
    differences,
    is_exact,
)
from lightning_dsmoe.analysis.certificate.judgement import judge
from lightning_dsmoe.analysis.certificate.reading import read_certificate
from lightning_dsmoe.analysis.certificate.record import TextSource, certificate
from lightning_dsmoe.commands.certificate_table import print_certificates
from lightning_dsmoe.commands.evaluation_setup import (
    CONTEXT,
    TEST_FRACTION,
    VAL_FRACTION,
    first_given,
    text_for,
    tokens_at_once,
)
from lightning_dsmoe.files import sha256
from lightning_dsmoe.inference import SparseModel, load_decoder
from lightning_dsmoe.inference.artifact.certificate import load_certificate, save_certificate
from lightning_dsmoe.serialization.checkpoint import LoadedDecoder

_NAMED = 3
_MAX_TOKENS, _BATCH_TOKENS = 100_000, 2048


def certify(
    artifact: str,
    ckpt_path: str | None = None,
    renew: bool = False,
    files: str | list[str] | None = None,
    split: Literal["val", "test"] | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    context: int | None = None,
    max_tokens: int | None = None,
    batch_tokens: int | None = None,
) -> None:
    """Measure a sparse model against its dense one and certify that, or check its certificate.

    An artifact without a certificate gets one, in certificate.json and in its card. One that has a
    certificate is checked: plan, weights and configuration must be those of the certificate, and
    what is measured on the same text must agree to 1 %, losses to 0.1 %. Whatever does not ends it
    with an error, as do other notes in certificate.json, and nothing is written.

    Args:
        artifact: directory of a sparse model.
        ckpt_path: checkpoint that it was made of, which proves that weights and tokenizer are the
            same; without it the artifact with all experts running is the dense model.
        renew: certify anew and leave aside whatever is in certificate.json.
        files: text files as in training; without it the Python sources of the standard library.
        split: part of the text to measure on; by default that of the certificate, or val.
        val_fraction: share of the text in the validation split; by default that of the
            certificate, that of training if there is a checkpoint, or 0.1.
        test_fraction: share of the text in the test split; by default likewise, or 0.
        context: tokens in a window; by default those of the certificate, or as in training.
        max_tokens: tokens to measure on at the most; by default those of the certificate, or
            100,000.
        batch_tokens: tokens of a batch; by default those of the certificate, or 2,048. Fewer run at
            once of a large model.

    Raises:
        ValueError: if the artifact, the checkpoint and the certificate do not belong together, a
            value differs, or the text is not fit for it or not that of the certificate.
    """
    path = Path(artifact)
    model = SparseModel.load(path, certified=not renew)
    name = f"{path / 'certificate.json'}"
    recorded = None if renew else read_certificate(name, load_certificate(path))
    loaded = checkpoint = None
    if ckpt_path is not None:
        loaded = load_decoder(ckpt_path)
        checkpoint = sha256(Path(ckpt_path))
        check_weights(model, loaded.decoder)
        if loaded.tokenizer != model.tokenizer_description:
            raise ValueError(
                "the artifact was not made of this checkpoint: its tokenizer is another"
            )
    given = {
        "split": split,
        "val_fraction": val_fraction,
        "test_fraction": test_fraction,
        "context": context,
        "max_tokens": max_tokens,
        "batch_tokens": batch_tokens,
    }
    trained_on = loaded or LoadedDecoder(model.decoder, model.tokenizer_description, model.context)
    text, source = _text(trained_on, files, given, recorded)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        progress.add_task(f"measuring on {text.n_tokens:,} tokens")
        decoder = None if loaded is None else loaded.decoder
        judgement = judge(model, text.in_batches_of(tokens_at_once(model.decoder)), decoder)
    off = judgement.all_experts_error
    if off is not None and off > ROUNDING and is_exact(model):
        raise ValueError(
            f"the artifact with all experts is not the checkpoint: a logit is off by {off:.3g} of "
            f"the largest one, rounding explains {ROUNDING:g}"
        )
    made = certificate(judgement, text, source, checkpoint=checkpoint)
    if recorded is None:
        save_certificate(path, model, made)
        print_certificates({"measured": made})
        print(f"The certificate is in {name}")
        return
    dense_too = recorded["dense"] == made["dense"] or is_exact(model)
    faults = differences(recorded, made, dense_too=dense_too)
    if faults:
        more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise ValueError(f"{name} does not hold: {'; '.join(faults[:_NAMED])}{more}")
    print_certificates({"certificate": recorded, "now": made})
    print(f"{name} holds.")
    if not dense_too:
        needed = "the same" if recorded["dense"] == "checkpoint" else "no"
        print(
            f"What compares with the dense model was not checked: that takes {needed} --ckpt_path"
        )


class _Text(NamedTuple):
    text: HeldOut
    source: TextSource


def _text(
    trained_on: LoadedDecoder,
    files: str | list[str] | None,
    given: Mapping[str, Any],
    recorded: Mapping[str, Any] | None,
) -> _Text:
    """The text to measure on: as given, then as recorded, then as usual."""
    known: Mapping[str, Any] = {}
    if recorded is not None:
        known = {**recorded["data"], "max_tokens": recorded["tokens"]}
        if files is None and known["source"] != "standard library":
            raise ValueError(
                "the certificate is of a text that it does not name: give the same --files, or "
                "--renew true for a certificate of another text"
            )
    usual = {
        "split": "val",
        "val_fraction": first_given(trained_on.val_fraction, VAL_FRACTION),
        "test_fraction": first_given(trained_on.test_fraction, TEST_FRACTION),
        "context": first_given(trained_on.context, CONTEXT),
        "max_tokens": _MAX_TOKENS,
        "batch_tokens": _BATCH_TOKENS,
    }
    options: dict[str, Any] = {
        name: first_given(given[name], known.get(name), value) for name, value in usual.items()
    }
    text = text_for(trained_on, files, **options)
    if recorded is not None and text.fingerprint() != recorded["data"]["fingerprint"]:
        raise ValueError(
            "the certificate is of another text, so there is nothing to compare: give the same "
            "files and options, or --renew true for a certificate of this text (the standard "
            "library is another with another Python)"
        )
    source = TextSource(
        "standard library" if files is None else "files",
        options["split"],
        options["val_fraction"],
        options["test_fraction"],
    )
    return _Text(text, source)
