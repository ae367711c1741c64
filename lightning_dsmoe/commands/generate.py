"""Continues a text with a checkpoint or a sparse model."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from tempfile import TemporaryFile

import torch

from lightning_dsmoe.commands.evaluation_setup import all_experts_model, read_plan
from lightning_dsmoe.inference import load_decoder, load_sparse


def generate(
    ckpt: str | None = None,
    artifact: str | None = None,
    prompt: str = "\n",
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 1234,
    stop: str | None = None,
    plan: str | None = None,
) -> None:
    """Generate text from a checkpoint or a sparse model.

    Args:
        ckpt: checkpoint of `fit`; all its experts run unless there is a plan.
        artifact: directory of a sparse model, instead of a checkpoint.
        prompt: text to continue.
        max_new_tokens: maximum number of new tokens.
        temperature: divides the logits; 0 always takes the most probable token (greedy).
        top_k: sample from the k most probable tokens only.
        top_p: sample from the fewest tokens whose probabilities add up to p.
        seed: random seed of the sampling.
        stop: stop string; the output ends with it.
        plan: JSON file of a selection plan; by default the model's own.

    Raises:
        ValueError: if not exactly one of ckpt and artifact is given, or an option is out of
            range.
    """
    if (ckpt is None) == (artifact is None):
        raise ValueError("generate needs either --ckpt or --artifact")
    model = load_sparse(str(artifact)) if ckpt is None else all_experts_model(load_decoder(ckpt))
    chosen = model.plan if plan is None else read_plan(plan, model.decoder)
    pieces = model.stream(
        prompt,
        max_new_tokens,
        plan=chosen,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop,
        generator=torch.Generator().manual_seed(seed),
    )
    if max_new_tokens > 1 and model.engine.start_warm_up(chosen, 1):
        print(
            "Another process compiles kernels: the text becomes faster once they are ready",
            file=sys.stderr,
        )
    with _errors_afterwards():
        for piece in chain([prompt], pieces):
            print(piece, end="", flush=True)
        print(flush=True)


@contextmanager
def _errors_afterwards() -> Iterator[None]:
    """Hold back what is written to standard error until the text is complete.

    Warnings of libraries, which come when kernels are loaded, would land inside the text, and a
    progress bar would erase its last line. Some are written by C++, past Python. Where standard
    error is no terminal it does not land there, and nothing is held back.
    """
    try:
        held = TemporaryFile() if os.isatty(2) else None  # noqa: SIM115
    except OSError:  # no place for it
        held = None
    if held is None:
        yield
        return
    with held, open(os.dup(2), "wb") as terminal:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(terminal.fileno(), 2)
            held.seek(0)
            terminal.write(held.read())
