"""The certificate of a sparse model: made, and checked against everything that can be wrong."""

import hashlib
import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_dsmoe.inference import compile_sparse, load_decoder, load_sparse
from lightning_dsmoe.routing import SelectionPlan, TopK

from .conftest import Outcome, Run

pytestmark = pytest.mark.slow

certify_module = import_module("lightning_dsmoe.commands.certify")

Certify = Callable[..., Outcome]


@pytest.fixture
def artifact(trained: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained.artifact, tmp_path / "sparse"))


@pytest.fixture
def bare(trained: Run, artifact: Path) -> Path:
    """The artifact without a certificate."""
    load_sparse(artifact).save(artifact)
    return artifact


@pytest.fixture
def files(trained: Run) -> str:
    [files] = [word for word in trained.words if word.startswith("--data.init_args.files=")]
    return f"--files={files.partition('=')[2]}"


@pytest.fixture
def certify(cli: Callable[..., Outcome], artifact: Path, files: str) -> Certify:
    return lambda *words: cli("certify", f"--artifact={artifact}", files, *words)


def content(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def read(artifact: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((artifact / "certificate.json").read_text())
    return data


def sign(artifact: Path) -> None:
    """Make the sums fit the files, as someone who forges them would."""
    names = sorted(path.name for path in artifact.iterdir() if path.suffix != ".md")
    (artifact / "SHA256SUMS").write_text(
        "".join(
            f"{hashlib.sha256((artifact / name).read_bytes()).hexdigest()}  {name}\n"
            for name in names
            if name != "SHA256SUMS"
        )
    )


def forge(artifact: Path, **changes: Any) -> None:
    (artifact / "certificate.json").write_text(json.dumps(read(artifact) | changes))
    sign(artifact)


def hashes(artifact: Path) -> dict[str, str]:
    """What a certificate must say of its model."""
    config = json.loads((artifact / "config.json").read_text())
    del config["switch_points"]
    contents = {"config.json": json.dumps(config, sort_keys=True).encode()}
    contents |= {n: (artifact / n).read_bytes() for n in ("plan.json", "model.safetensors")}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def other_weights(artifact: Path) -> None:
    weights = load_file(artifact / "model.safetensors")
    weights["blocks.0.feed_forward.experts.w_out.weight"] *= -1
    save_file(weights, artifact / "model.safetensors")
    sign(artifact)


def fails(outcome: Outcome, folder: Path, before: dict[str, bytes]) -> str:
    """The one line that a failure says, after nothing was written."""
    assert outcome.code == 1, outcome.out
    assert content(folder) == before
    [error] = outcome.errors
    return error


def test_the_certificate_of_training_holds(
    certify: Certify,
    artifact: Path,
    trained: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = content(tmp_path)
    monkeypatch.setattr(certify_module, "tokens_at_once", lambda decoder: 16)  # a window at a time
    for words in ([], [f"--ckpt_path={trained.checkpoint}"]):
        outcome = certify(*words)
        assert outcome.code == 0, outcome.err
        assert "certificate.json matches." in outcome.out.replace("\n", "")
        assert "95 % interval" in outcome.out
        assert "not checked" not in outcome.out
    assert content(tmp_path) == before


@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_a_first_certificate(
    with_checkpoint: bool, certify: Certify, bare: Path, trained: Run, tmp_path: Path
) -> None:
    before = content(bare)
    words = [f"--ckpt_path={trained.checkpoint}"] if with_checkpoint else []
    options = ["--split=test", "--test_fraction=0.2", "--max_tokens=300", "--batch_tokens=64"]
    outcome = certify(*options, *words)
    assert outcome.code == 0, outcome.err
    made = read(bare)
    assert made["dense"] == ("checkpoint" if with_checkpoint else "artifact")
    assert (made["all_experts_error"] is not None) == with_checkpoint
    digest = hashlib.sha256(Path(trained.checkpoint).read_bytes()).hexdigest()
    assert made["checkpoint_sha256"] == (digest if with_checkpoint else None)
    assert made["tokens"] == 320
    data = made["data"]
    assert [data[name] for name in ("source", "split", "context", "batch_tokens")] == [
        "files",
        "test",
        16,
        64,
    ]
    val_fraction = 0.05 if with_checkpoint else 0.1  # the artifact alone does not know
    assert (data["val_fraction"], data["test_fraction"]) == (val_fraction, 0.2)
    assert made["sha256"] == hashes(bare)
    after = content(bare)
    assert {n for n in after if after[n] != before.get(n)} == {
        "certificate.json",
        "README.md",
        "SHA256SUMS",
    }
    assert f"- loss {made['sparse_loss']:.3f} nats per token, " in (bare / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["sparse"]
    load_sparse(bare)
    outcome = certify(f"--ckpt_path={trained.checkpoint}")
    assert outcome.code == 0, outcome.err
    assert content(bare) == after


def test_renewing(certify: Certify, artifact: Path) -> None:
    first = read(artifact)
    outcome = certify("--renew=true", "--max_tokens=200", "--batch_tokens=64")
    assert outcome.code == 0, outcome.err
    made = read(artifact)
    assert made["tokens"] < first["tokens"]
    assert made["data"]["fingerprint"] != first["data"]["fingerprint"]


def test_changed_weights(certify: Certify, artifact: Path, tmp_path: Path) -> None:
    with (artifact / "model.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"!")
    before = content(tmp_path)
    for words in ([], ["--renew=true"]):
        assert "sparse was changed: SHA256SUMS does not match model.safet" in fails(
            certify(*words), tmp_path, before
        )


def test_changed_weights_whose_sums_were_forged(
    certify: Certify, artifact: Path, trained: Run, tmp_path: Path
) -> None:
    other_weights(artifact)
    before = content(tmp_path)
    error = fails(certify(), tmp_path, before)
    assert "sparse is certified for other weights: the SHA-256 of model.safetensors is" in error
    forge(artifact, sha256=hashes(artifact))
    before = content(tmp_path)
    assert "certificate.json does not match: " in fails(certify(), tmp_path, before)
    checkpoint = f"--ckpt_path={trained.checkpoint}"
    for words in ([checkpoint], [checkpoint, "--renew=true"]):
        assert (
            "the artifact was not made of this checkpoint: "
            "blocks.0.feed_forward.experts.w_out.weight differs"
        ) in fails(certify(*words), tmp_path, before)


def test_another_plan(certify: Certify, artifact: Path, tmp_path: Path) -> None:
    plan = SelectionPlan(experts=TopK(1), attention=TopK(1))
    plan.save(artifact / "plan.json")
    sign(artifact)
    error = fails(certify(), tmp_path, content(tmp_path))
    assert "is certified for another plan: the SHA-256 of plan.json is" in error


def test_another_tokenizer(certify: Certify, artifact: Path, trained: Run, tmp_path: Path) -> None:
    config = json.loads((artifact / "config.json").read_text())
    alphabet = "".join(map(chr, range(256))) + "é€"
    config["tokenizer"] = {"kind": "char", "alphabet": alphabet[-256:]}
    (artifact / "config.json").write_text(json.dumps(config))
    sign(artifact)
    before = content(tmp_path)
    error = fails(certify(), tmp_path, before)
    assert "is certified for another configuration: the SHA-256 of config.json is" in error
    words = ["--renew=true", f"--ckpt_path={trained.checkpoint}"]
    error = fails(certify(*words), tmp_path, before)
    assert error.endswith("the artifact was not made of this checkpoint: its tokenizer differs")


def test_a_certificate_of_another_artifact(
    certify: Certify, artifact: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(artifact, tmp_path / "other"))
    (other / "certificate.json").unlink()
    sign(other)
    other_weights(other)
    outcome = certify(f"--artifact={other}", "--batch_tokens=64")
    assert outcome.code == 0, outcome.err
    shutil.copy(other / "certificate.json", artifact)
    error = fails(certify(), tmp_path, content(tmp_path))
    assert "was changed: SHA256SUMS does not match certificate.json" in error
    sign(artifact)
    error = fails(certify(), tmp_path, content(tmp_path))
    assert "sparse is certified for other weights: the SHA-256 of model.safetensors is" in error


def test_forged_values(certify: Certify, artifact: Path, tmp_path: Path) -> None:
    made = read(artifact)
    forge(artifact, sparse_loss=made["sparse_loss"] * 0.9, kl=0.0, active_share_mean=0.01)
    error = fails(certify(), tmp_path, content(tmp_path))
    assert "does not match: sparse_loss is " in error
    assert f"the certificate says {made['sparse_loss'] * 0.9:.6g}; " in error


def test_another_checkpoint(certify: Certify, artifact: Path, trained: Run, tmp_path: Path) -> None:
    checkpoint = torch.load(trained.checkpoint, weights_only=True)
    checkpoint["state_dict"]["decoder.norm.weight"] += 0.01
    torch.save(checkpoint, tmp_path / "other.ckpt")
    before = content(tmp_path)
    for words in ([], ["--renew=true"]):
        error = fails(certify(f"--ckpt_path={tmp_path / 'other.ckpt'}", *words), tmp_path, before)
        assert "not made of this checkpoint: norm.weight differs" in error


def test_an_engine_that_computes_something_else(
    certify: Certify, bare: Path, trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = certify_module.judge
    monkeypatch.setattr(
        certify_module, "judge", lambda *args: judge(*args)._replace(all_experts_error=0.01)
    )
    before = content(tmp_path)
    words = [f"--ckpt_path={trained.checkpoint}", "--batch_tokens=64"]
    error = fails(certify(*words), tmp_path, before)
    assert "a logit differs by 0.01 of the largest one, rounding explains 1e-05" in error


def test_the_hash_is_that_of_the_checkpoint_that_was_measured(
    certify: Certify, bare: Path, trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "last.ckpt"
    shutil.copyfile(trained.checkpoint, checkpoint)
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    judge = certify_module.judge

    def judge_while_training(*args: Any) -> Any:
        checkpoint.write_bytes(b"a later one")
        return judge(*args)

    monkeypatch.setattr(certify_module, "judge", judge_while_training)
    outcome = certify(f"--ckpt_path={checkpoint}", "--max_tokens=64", "--batch_tokens=64")
    assert outcome.code == 0, outcome.err
    assert read(bare)["checkpoint_sha256"] == digest


def test_another_text(
    cli: Callable[..., Outcome], certify: Certify, artifact: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("def f(x): return x\n" * 3)
    (tmp_path / "other.txt").write_text("".join(f"x = {i}\n" for i in range(9000)))
    before = content(tmp_path)
    for words, message in (
        ([f"--files={tmp_path / 'short.txt'}"], "needs at least 17: use more text"),
        ([f"--files={tmp_path / 'short.txt'}", "--renew=true"], "needs at least 17: use more text"),
        ([f"--files={tmp_path / 'other.txt'}"], "the certificate is of another text"),
        (["--val_fraction=0.3"], "the certificate is of another text"),
        (["--context=8"], "the certificate is of another text"),
    ):
        assert message in fails(certify(*words), tmp_path, before)
    outcome = cli("certify", f"--artifact={artifact}")
    assert "the certificate is of a text that it does not name" in fails(outcome, tmp_path, before)


def test_broken_certificates(certify: Certify, artifact: Path, tmp_path: Path) -> None:
    forge(artifact, kl="small")
    error = fails(certify(), tmp_path, content(tmp_path))
    assert error.endswith("certificate.json: kl must be a finite number, got 'small'")
    (artifact / "certificate.json").write_text("{")
    sign(artifact)
    error = fails(certify(), tmp_path, content(tmp_path))
    assert "certificate.json is not JSON" in error
    (artifact / "certificate.json").write_text('{"loss": 1.25}')
    sign(artifact)
    error = fails(certify(), tmp_path, content(tmp_path))
    assert error.endswith("certificate.json must be an object with a format_version")
    assert certify("--renew=true", "--batch_tokens=64").code == 0
    assert certify().code == 0


def test_an_interruption_leaves_nothing_behind(
    certify: Certify, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    before = content(tmp_path)
    monkeypatch.setattr("lightning_dsmoe.inference.artifact.hashes.sum_lines", failing)
    error = fails(certify("--batch_tokens=64"), tmp_path, before)
    assert "No space left on device" in error


def test_eight_bits(certify: Certify, artifact: Path, trained: Run, tmp_path: Path) -> None:
    loaded = load_decoder(trained.checkpoint)
    plan = SelectionPlan(experts=TopK(4), attention=TopK(2))
    model = compile_sparse(
        loaded.decoder,
        plan,
        quantization="int8",
        tokenizer=loaded.tokenizer,
        context_length=loaded.context,
    )
    model.save(artifact)
    checkpoint = f"--ckpt_path={trained.checkpoint}"
    outcome = certify(checkpoint, "--batch_tokens=64")
    assert outcome.code == 0, outcome.err
    made = read(artifact)
    assert made["all_experts_error"] > 1e-4
    assert made["loss_before_quantization"] == pytest.approx(made["sparse_loss"], rel=0.05)
    assert 0.8 < made["routing_agreement"] <= 1
    assert "loss before int8" in outcome.out
    outcome = certify(checkpoint)
    assert outcome.code == 0, outcome.err
    assert "not checked" not in outcome.out
    outcome = certify()
    assert outcome.code == 0, outcome.err
    assert "Comparisons with the dense model were not checked" in outcome.out
    forge(artifact, dense_loss=made["dense_loss"] * 2)
    assert certify().code == 0
    error = fails(certify(checkpoint), tmp_path, content(tmp_path))
    assert "does not match: dense_loss is" in error


def test_models_that_cannot_read(certify: Certify, artifact: Path, tmp_path: Path) -> None:
    model = load_sparse(artifact)
    model.tokenizer = None
    model.save(artifact)
    assert "saved without a tokenizer" in fails(certify(), tmp_path, content(tmp_path))
    outcome = certify(f"--artifact={tmp_path / 'absent'}")
    assert "no sparse model at" in fails(outcome, tmp_path, content(tmp_path))
