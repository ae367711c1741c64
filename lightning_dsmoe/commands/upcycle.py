"""Dense models of transformers as mixtures of experts."""

from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from lightning_dsmoe.routing import routed_layers
from lightning_dsmoe.tokenizers import load_tokenizer
from lightning_dsmoe.upcycling import save_upcycled
from lightning_dsmoe.upcycling import upcycle as upcycle_in_place
from lightning_dsmoe.upcycling.directory import check_free
from lightning_dsmoe.upcycling.source import load_source
from lightning_dsmoe.upcycling.upcycle import MAX_TOKENS, RouterInit, Split

_CONTEXT = 512


def upcycle(
    from_: str,
    n_experts: int,
    output: str = "upcycled",
    split: Split = "contiguous",
    router: RouterInit = "zero",
    text: str | None = None,
    into: Literal["transformers", "decoder"] = "transformers",
    trust_remote_code: bool = False,
) -> None:
    """Turn the feed-forward layers of a transformers model into mixtures of experts.

    The model stays one of transformers: attention and all else are untouched. With all experts on
    it gives the same logits, to rounding, if the router is zero. To train it: `fit -c
    cli_configs/upcycle.yaml`.

    Args:
        from_: directory with config.json and safetensors, and the tokenizer if there is a text.
        n_experts: number of experts of each layer.
        output: directory to write, or the checkpoint for `--into decoder`.
        split: "contiguous" keeps neurons in their order, "weights" puts those of similar input
            weights together, "activations" those that are active for the same tokens of the text.
        router: "zero", or "activations" for routers fitted to what each expert contributes.
        text: file with sample text, for activations; its first 2,048 tokens are read.
        into: "decoder" writes a checkpoint of this library's own decoder, for some architectures.
        trust_remote_code: run the code that the model's configuration names.

    Raises:
        FileNotFoundError: if there is no configuration, no safetensors or no text.
        FileExistsError: if something else is at `output`.
        ValueError: if the model is not supported or has a layer that is not recognised.
    """
    directory = Path(from_)
    if into == "decoder":
        _into_decoder(directory, n_experts, output, plain=(split, router) == ("contiguous", "zero"))
        return
    check_free(Path(output))
    if ("activations" in (split, router)) != (text is not None):
        raise ValueError("activations need --text with a sample text, and nothing else does")
    tokens = None if text is None else _tokens(directory, Path(text))
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        model = load_source(
            directory,
            trust_remote_code=trust_remote_code,
            progress=_shown(progress, f"reading {directory}"),
        )
        vocab_size = model.get_input_embeddings().weight.shape[0]
        if tokens is not None and int(tokens.max()) >= vocab_size:
            raise ValueError(
                f"the tokenizer gives token {int(tokens.max())}, the model has {vocab_size}"
            )
        if tokens is not None:
            most = getattr(model.config, "max_position_embeddings", None) or _CONTEXT
            context = min(_CONTEXT, most, len(tokens))
            tokens = tokens[: len(tokens) // context * context].view(-1, context)
        names = upcycle_in_place(
            model,
            n_experts,
            split=split,
            router=router,
            tokens=None if tokens is None else tokens.split(1),
            progress=_shown(progress, "upcycling"),
        )
    with console.status(f"writing {output}"):
        save_upcycled(model, output, tokenizer_from=directory)
    layer = routed_layers(model)[names[0]]
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{output} holds {type(model).__name__} with {size:,} parameters and {len(names)} mixtures "
        f"of {n_experts} experts of {layer.d_expert} neurons."
    )


def _shown(progress: Progress, what: str) -> Any:
    task = progress.add_task(what)
    return lambda done, total: progress.update(task, completed=done, total=total)


def _tokens(directory: Path, text: Path) -> Tensor:
    """The first tokens of a text."""
    if not text.is_file():
        raise FileNotFoundError(f"no text at {text}")
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    with text.open(encoding="utf-8") as file:
        numbers = torch.from_numpy(tokenizer.encode(file.read(64 * MAX_TOKENS)))[:MAX_TOKENS]
    if not len(numbers):
        raise ValueError(f"{text} is empty")
    return numbers


def _into_decoder(directory: Path, n_experts: int, output: str, *, plain: bool) -> None:
    if not plain:
        raise ValueError("--into decoder splits contiguously, with routers of zeros")
    from lightning_dsmoe.commands.import_ import import_

    import_(directory.as_posix(), output, n_experts)
