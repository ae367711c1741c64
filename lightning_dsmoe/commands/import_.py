"""Models of transformers as checkpoints."""

import importlib.metadata
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.files import atomic_path, check_file
from lightning_dsmoe.hugging_face.import_hf import (
    Split,
    check_experts,
    import_hf,
    read_source,
)
from lightning_dsmoe.hugging_face.neuron_order import MAX_TOKENS
from lightning_dsmoe.routing import routed_layers
from lightning_dsmoe.routing.plan import describe
from lightning_dsmoe.serialization.architecture import describe_decoder
from lightning_dsmoe.serialization.checkpoint import FORMAT_VERSION
from lightning_dsmoe.tokenizers import Tokenizer, load_tokenizer

_MOST_POSITIONS = 4096
_MOST_LOGITS = 2**30  # of one window of text
_SAMPLE_CHARACTERS = 2**17
_SAMPLE_WINDOW = 256
_TOKENIZER = "tokenizer.json"
_MODEL = "lightning_dsmoe.DSMoELanguageModel"


def import_(
    from_: str,
    output: str = "imported.ckpt",
    n_experts: int | None = None,
    split: Split = "contiguous",
    text: str | None = None,
) -> None:
    """Write a checkpoint of a model of transformers, which gives the same logits.

    The checkpoint is read by sweep, calibrate, prune, certify, report and generate. Beside it,
    under its name with .plan.json, is the plan that the model's configuration runs: the top k of a
    published mixture, or all experts of a dense model, whose layers become mixtures.

    Args:
        from_: directory with config.json, safetensors and, to read text, tokenizer.json.
        output: checkpoint to write; an earlier one is replaced.
        n_experts: experts of each feed-forward layer of a dense model, a divisor of its neurons.

        split: of a dense model: "contiguous" keeps neurons in their order, "weights" puts those of
            similar input weights together, "activations" those active for the same tokens.
        text: file of a sample text, for activations; its first 2,048 tokens count.

    Raises:
        FileNotFoundError: if there is no configuration, no safetensors, or no text.
        ValueError: if the model is not supported, a file is not whole or does not match, or the
            tokenizer is of a larger vocabulary.
    """
    check_file(output, text)
    plan_path = Path(output).with_suffix(".plan.json")
    check_file(str(plan_path), text)
    directory = Path(from_)
    source = read_source(directory)
    check_experts(source, n_experts)
    tokenizer = _tokenizer(directory, source.vocab_size)
    tokens = None if text is None else _tokens_of(Path(text), tokenizer, source.max_positions)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(f"reading {directory}")

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        decoder = import_hf(
            directory, n_experts=n_experts, split=split, tokens=tokens, progress=show
        )
    context = min(source.max_positions, _MOST_POSITIONS, max(1, _MOST_LOGITS // source.vocab_size))
    with atomic_path(Path(output)) as path, Console(stderr=True).status(f"writing {output}"):
        torch.save(checkpoint_of(decoder, tokenizer, context), path)
    source.plan.save(plan_path)
    size = sum(parameter.numel() for parameter in decoder.parameters())
    print(f"{output} holds {source.family} with {size:,} parameters, for {context:,} tokens.")
    print(f"Its plan ({describe(source.plan, routed_layers(decoder))}) is in {plan_path}")
    if tokenizer is None:
        print(f"There is no {_TOKENIZER} in {directory}, so it cannot read text.")


def _tokens_of(path: Path, tokenizer: Tokenizer | None, max_positions: int) -> Tensor:
    """The beginning of a text as windows `[B, T]` of tokens."""
    if tokenizer is None:
        raise ValueError(f"text={path} needs a {_TOKENIZER} beside the model, to make tokens of it")
    try:
        with path.open(encoding="utf-8") as file:
            numbers = tokenizer.encode(file.read(_SAMPLE_CHARACTERS))[:MAX_TOKENS]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from None
    if not len(numbers):
        raise ValueError(f"{path} holds no text")
    width = min(_SAMPLE_WINDOW, max_positions, len(numbers))
    return torch.from_numpy(numbers[: len(numbers) // width * width]).view(-1, width)


def checkpoint_of(decoder: Decoder, tokenizer: Tokenizer | None, context: int) -> dict[str, Any]:
    """What a checkpoint of `DSMoELanguageModel` holds before its first step.

    Args:
        decoder: the model.
        tokenizer: of its text.
        context: tokens in a window.
    """
    architecture = describe_decoder(decoder)
    return {
        "format_version": FORMAT_VERSION,
        "architecture": architecture,
        "state_dict": {f"decoder.{name}": each for name, each in decoder.state_dict().items()},
        "tokenizer": None if tokenizer is None else tokenizer.to_dict(),
        "context": context,
        "val_fraction": None,
        "test_fraction": None,
        # With which `DSMoELanguageModel.load_from_checkpoint` builds the model, to train it; a
        # copy, since building changes it.
        "hyper_parameters": {
            "_class_path": _MODEL,
            "_instantiator": "lightning.pytorch.cli.instantiate_module",
            **deepcopy(architecture),
        },
        "pytorch-lightning_version": importlib.metadata.version("lightning"),
        "epoch": 0,
        "global_step": 0,
        "optimizer_states": [],
        "lr_schedulers": [],
    }


def _tokenizer(directory: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a directory, None without one.

    Raises:
        ValueError: if it is none, or has tokens that the model has not.
    """
    path = directory / _TOKENIZER
    if not path.is_file():
        return None
    try:
        tokenizer = load_tokenizer(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{path} has {tokenizer.vocab_size} tokens, the model only {vocab_size}: it belongs to "
            "another model"
        )
    return tokenizer
