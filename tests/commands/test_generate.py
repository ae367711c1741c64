"""Text from a model, on the terminal."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.inference import SwitchPoints, compile_sparse, load_sparse
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.tokenizers import ByteTokenizer, CharTokenizer

pytestmark = pytest.mark.slow
generate_command: Any = import_module("lightning_dsmoe.commands.generate")

PROMPT = "--prompt=def f"
GREEDY = (PROMPT, "--temperature=0", "--max_new_tokens=30")


def test_checkpoint_and_artifact_agree(cli: Any, trained: Any, tmp_path: Path) -> None:
    everything, sparse = tmp_path / "all.json", tmp_path / "sparse.json"
    SelectionPlan().save(everything)
    load_sparse(trained.artifact).plan.save(sparse)
    checkpoint, artifact = f"--ckpt={trained.checkpoint}", f"--artifact={trained.artifact}"

    text = cli("generate", checkpoint, *GREEDY).out
    tokenizer = ByteTokenizer()
    prompt = torch.from_numpy(tokenizer.encode("def f"))[None]
    model = load_sparse(trained.artifact)
    tokens = model.generate(prompt, 30, plan=SelectionPlan(), temperature=0)
    assert tokens.shape == (1, 35)
    whole = tokenizer.decode(tokens[0].tolist())
    assert whole.startswith(text[:-1])
    assert len(whole) - len(text[:-1]) < 4  # what may be the beginning of a character
    assert cli("generate", artifact, *GREEDY, f"--plan={everything}").out == text
    own = cli("generate", artifact, *GREEDY).out
    assert cli("generate", checkpoint, *GREEDY, f"--plan={sparse}").out == own


def test_a_checkpoint_is_compiled_by_its_path(cli: Any, trained: Any) -> None:
    model = compile_sparse(trained.checkpoint, SelectionPlan())
    assert model.context_length == 16
    text = model.generate("def f", 30, temperature=0)
    assert cli("generate", f"--ckpt={trained.checkpoint}", *GREEDY).out == text + "\n"
    with pytest.raises(FileNotFoundError, match="no checkpoint at absent"):
        compile_sparse("absent", SelectionPlan())


def test_seed_repeats(cli: Any, trained: Any) -> None:
    words = ["generate", f"--artifact={trained.artifact}", PROMPT, "--max_new_tokens=12"]
    first, again, other = (
        cli(*words, "--temperature=2", f"--seed={seed}").out for seed in (5, 5, 6)
    )
    assert first == again != other


def test_the_command_and_python_sample_alike(cli: Any, trained: Any) -> None:
    words = ["generate", f"--artifact={trained.artifact}", PROMPT, "--max_new_tokens=12"]
    model, generator = load_sparse(trained.artifact), torch.Generator().manual_seed(1234)
    pieces = model.stream("def f", 12, generator=generator)
    assert cli(*words).out == f"def f{''.join(pieces)}\n"


def test_narrow_sampling_is_greedy(cli: Any, trained: Any) -> None:
    words = ["generate", f"--artifact={trained.artifact}", PROMPT, "--max_new_tokens=9"]
    greedy = cli(*words, "--temperature=0").out
    assert cli(*words, "--temperature=3", "--top_k=1").out == greedy
    assert cli(*words, "--temperature=3", "--top_p=1e-6").out == greedy


@pytest.mark.parametrize("option", ["--temperature=0", "--temperature=1", "--top_k=2"])
def test_logits_that_are_not_finite(option: str, cli: Any, trained: Any, tmp_path: Path) -> None:
    checkpoint = torch.load(trained.checkpoint, weights_only=True)
    checkpoint["state_dict"]["decoder.embedding.weight"] *= 1e4
    checkpoint["state_dict"]["decoder.norm.weight"] *= 1e38  # finite, unlike its products
    torch.save(checkpoint, tmp_path / "large.ckpt")
    outcome = cli("generate", f"--ckpt={tmp_path / 'large.ckpt'}", PROMPT, option)
    assert outcome.code == 1
    assert "the logits are not finite" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert outcome.out == PROMPT.removeprefix("--prompt=")


def test_nothing_new(cli: Any, trained: Any) -> None:
    words = [f"--artifact={trained.artifact}", "--prompt=é", "--max_new_tokens=0"]
    assert cli("generate", *words).out == "é\n"


def test_stop_ends_the_text(cli: Any, trained: Any) -> None:
    words = ["generate", f"--artifact={trained.artifact}", "--prompt=a", "--temperature=9"]
    text = cli(*words, "--max_new_tokens=60").out
    stop = next(letter for letter in text[1:] if letter.isalpha() and letter.isascii())
    end = text.index(stop, 1) + 1
    assert cli(*words, "--max_new_tokens=60", f"--stop={stop}").out == text[:end] + "\n"
    longer = text[end - 1 : end + 2]
    assert cli(*words, "--max_new_tokens=60", f"--stop={longer}").out == text[: end + 2] + "\n"


@contextlib.contextmanager
def standard_error() -> Iterator[Callable[[], bytes]]:
    """What has arrived at standard error, which is a pipe."""
    before, (here, there) = os.dup(2), os.pipe()
    os.dup2(there, 2)
    os.close(there)
    os.set_blocking(here, False)

    def arrived() -> bytes:
        with contextlib.suppress(BlockingIOError):
            return os.read(here, 99)
        return b""

    try:
        yield arrived
    finally:
        os.dup2(before, 2)
        for number in (before, here):
            os.close(number)


def test_errors_come_after_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "isatty", lambda _: True)
    with standard_error() as arrived:
        with contextlib.suppress(KeyboardInterrupt), generate_command._errors_afterwards():
            os.write(2, b"late")
            assert arrived() == b""
            raise KeyboardInterrupt
        assert arrived() == b"late"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_errors_are_not_held_back_without_need_or_place(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise FileNotFoundError("no usable temporary directory found")

    monkeypatch.setattr(os, "isatty", lambda _: is_terminal)
    monkeypatch.setattr(generate_command, "TemporaryFile", full)
    with standard_error() as arrived, generate_command._errors_afterwards():
        os.write(2, b"at once")
        assert arrived() == b"at once"


ON_A_TERMINAL = """
import os, sys, warnings
from rich.console import Console
from rich.progress import track
from lightning_dsmoe.cli import main
from lightning_dsmoe.inference import SparseModel

stream = SparseModel.stream

def noisy(*args, **options):
    for number, piece in enumerate(stream(*args, **options)):
        if number == 3:
            os.write(2, b"No CUDA runtime is found\\n")  # as C++ does
            warnings.warn("foreign")
            for _ in track([1, 2], "Compiling", console=Console(stderr=True)):
                pass
        yield piece

SparseModel.stream = noisy
main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_the_text_stays_whole_on_a_terminal(tmp_path: Path) -> None:
    import pty

    torch.manual_seed(0)
    points, letters = SwitchPoints(gather_up_to=0), CharTokenizer("abcdefghijklmnopqrstuvwxyz (")
    heads = partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=4)
    decoder = Decoder(
        28, 8, 1, attention=heads, feed_forward=partial(MixtureOfExperts, n_experts=2, d_expert=4)
    )
    model = compile_sparse(decoder, SelectionPlan(), tokenizer=letters, switch_points=points)
    model.save(tmp_path / "sparse")
    options = ["--prompt=main(", "--temperature=0", "--max_new_tokens=12"]
    words = ["generate", f"--artifact={tmp_path / 'sparse'}", *options]
    here, there = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, *words],
        stdin=there,
        stdout=there,
        stderr=there,
        env=environment,
    ) as running:
        os.close(there)
        seen = b""
        with contextlib.suppress(OSError):  # of Linux, when the other end is closed
            while part := os.read(here, 4096):
                seen += part
    os.close(here)
    assert running.returncode == 0, seen
    text = model.generate("main(", 12, temperature=0)
    before, found, after = seen.decode().partition(f"{text}\r\n")
    assert found, seen
    assert "\x1b" not in before
    for said in ("No CUDA runtime is found", "UserWarning: foreign", "Compiling"):
        assert after.count(said) == 1
        assert said not in before
