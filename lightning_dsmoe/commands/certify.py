"""The certificate of a sparse model: measured and written, or checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from lightning_dsmoe.analysis import HeldOut
from lightning_dsmoe.analysis.certificate import check
from lightning_dsmoe.analysis.certificate.judgement import Judgement, judge
from lightning_dsmoe.analysis.certificate.reading import read_certificate
from lightning_dsmoe.analysis.certificate.record import Source, TextSource, certificate
from lightning_dsmoe.commands import evaluation_setup
from lightning_dsmoe.commands.certificate_table import print_certificates
from lightning_dsmoe.commands.evaluation_setup import first_given, text_for, tokens_at_once
from lightning_dsmoe.files import check_place, sha256
from lightning_dsmoe.inference import SparseModel, load_decoder
from lightning_dsmoe.inference.artifact.certificate import load_certificate, save_certificate
from lightning_dsmoe.serialization.checkpoint import LoadedDecoder

_NAMED_DIFFERENCES = 3


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
    """Certify what a sparse model loses against all experts, or check its certificate.

    An artifact without a certificate gets one, in certificate.json and in its model card. An
    existing certificate is checked: plan, weights and configuration must have its hashes, and a new
    measurement on the same text must agree to 1 %, losses to 0.1 %. Otherwise, and if
    certificate.json is invalid, the command fails and writes nothing.

    Args:
        artifact: directory of a sparse model.
        ckpt_path: checkpoint it was compiled from; verifies the source of weights and tokenizer.
            Without it the artifact with all experts running is the dense model.
        renew: measure again and replace certificate.json.
        files: text files as in training; without it the Python sources of the standard library.
        split: part of the text to measure on; by default that of the certificate, or val.
        val_fraction: share of the text in the validation split; by default that of the
            certificate, that of training if there is a checkpoint, or 0.1.
        test_fraction: share of the text in the test split; by default likewise, or 0.
        context: tokens in a window; by default those of the certificate, or as in training.
        max_tokens: maximum number of tokens; by default those of the certificate, or 100,000.
        batch_tokens: batch size in tokens; by default that of the certificate, or 2,048. A large
            model runs smaller batches.

    Raises:
        ValueError: if artifact, checkpoint and certificate do not belong together, a value differs,
            or the text is invalid or not that of the certificate.
    """
    path = Path(artifact)
    name = f"{path / 'certificate.json'}"
    model = SparseModel.load(path, certified=not renew)
    recorded = None if renew else read_certificate(name, load_certificate(path))
    if recorded is None:
        check_place(Path(name))
    source = digest = None
    if ckpt_path is not None:
        source = _verified_source(Path(ckpt_path), model)
        digest = sha256(Path(ckpt_path))  # before measuring: training may write it again meanwhile
    given = {
        "split": split,
        "val_fraction": val_fraction,
        "test_fraction": test_fraction,
        "context": context,
        "max_tokens": max_tokens,
        "batch_tokens": batch_tokens,
    }
    trained_on = source or LoadedDecoder(
        model.decoder, model.tokenizer_description, model.context_length
    )
    text, origin = _text(trained_on, files, given, recorded)
    judgement = _measure(model, text, source)
    measured = certificate(judgement, text, origin, checkpoint=digest)
    if recorded is None:
        save_certificate(path, model, measured)
        print_certificates({"measured": measured})
        print(f"The certificate is in {name}")
    else:
        same_dense = recorded["dense"] == measured["dense"] or check.is_exact(model)
        _compare(name, recorded, measured, same_dense=same_dense)


def _verified_source(ckpt_path: Path, model: SparseModel) -> LoadedDecoder:
    """The checkpoint that a sparse model was made of, and no other."""
    loaded = load_decoder(ckpt_path)
    check.check_weights(model, loaded.decoder)
    if loaded.tokenizer != model.tokenizer_description:
        raise ValueError("the artifact was not made of this checkpoint: its tokenizer differs")
    return loaded


def _measure(model: SparseModel, text: HeldOut, source: LoadedDecoder | None) -> Judgement:
    with Console(stderr=True).status(f"measuring on {text.n_tokens:,} tokens"):
        decoder = None if source is None else source.decoder
        judgement = judge(model, text.in_batches_of(tokens_at_once(model.decoder)), decoder)
    error = judgement.all_experts_error
    if error is not None and error > check.ROUNDING and check.is_exact(model):
        raise ValueError(
            f"the artifact with all experts is not the checkpoint: a logit differs by {error:.3g} "
            f"of the largest one, rounding explains {check.ROUNDING:g}"
        )
    return judgement


def _compare(
    name: str, recorded: Mapping[str, Any], measured: Mapping[str, Any], *, same_dense: bool
) -> None:
    """Print both certificates, or raise a ValueError that names what differs."""
    faults = check.differences(recorded, measured, dense_too=same_dense)
    if faults:
        named, others = faults[:_NAMED_DIFFERENCES], len(faults) - _NAMED_DIFFERENCES
        more = f" and {others} more" if others > 0 else ""
        raise ValueError(f"{name} does not match: {'; '.join(named)}{more}")
    print_certificates({"certificate": recorded, "now": measured})
    print(f"{name} matches.")
    if not same_dense:
        needed = "the same" if recorded["dense"] == "checkpoint" else "no"
        print(f"Comparisons with the dense model were not checked: they need {needed} --ckpt_path")


def _text(
    trained_on: LoadedDecoder,
    files: str | list[str] | None,
    given: Mapping[str, Any],
    recorded: Mapping[str, Any] | None,
) -> tuple[HeldOut, TextSource]:
    """The text to measure on: options as given, else as recorded, else the defaults."""
    earlier: Mapping[str, Any] = {}
    if recorded is not None:
        earlier = {**recorded["data"], "max_tokens": recorded["tokens"]}
        if files is None and earlier["source"] != "standard library":
            raise ValueError(
                "the certificate is of a text that it does not name: give the same --files, or "
                "--renew true for a certificate of another text"
            )
    defaults = {
        "split": "val",
        "val_fraction": first_given(trained_on.val_fraction, evaluation_setup.VAL_FRACTION),
        "test_fraction": first_given(trained_on.test_fraction, evaluation_setup.TEST_FRACTION),
        "context": first_given(trained_on.context, evaluation_setup.CONTEXT),
        "max_tokens": 100_000,
        "batch_tokens": 2048,
    }
    options: dict[str, Any] = {
        name: first_given(given[name], earlier.get(name), value) for name, value in defaults.items()
    }
    text = text_for(trained_on, files, **options)
    if recorded is not None and text.fingerprint() != recorded["data"]["fingerprint"]:
        raise ValueError(
            "the certificate is of another text, so there is nothing to compare: give the same "
            "files and options, or --renew true for a certificate of this text (the standard "
            "library is another with another Python)"
        )
    origin: Source = "standard library" if files is None else "files"
    splits = options["split"], options["val_fraction"], options["test_fraction"]
    return text, TextSource(origin, *splits)
