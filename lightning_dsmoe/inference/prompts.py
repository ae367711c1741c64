"""What a sparse model continues: text or tokens, with options whose names are checked."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard, cast

from torch import Tensor

from lightning_dsmoe.inference.engine.engine import Engine
from lightning_dsmoe.inference.generation import Tokens, generate
from lightning_dsmoe.inference.text import continue_texts, stream_text
from lightning_dsmoe.tokenizers import Tokenizer

Texts = list[str] | tuple[str, ...]
Prompts = str | Texts | Tokens

_OPTIONS = {*inspect.signature(generate).parameters} - {"model", "tokens"}
_OF_TOKENS_ONLY = {"mask", "on_tokens"}

_PROMPTS = "the prompts are its first argument: text, texts or tokens"
_SEVERAL = "give the prompt as often as you want continuations of it"
_STOP = "stop=... takes texts for prompts of text, and tokens for tokens"
_HINTS = {
    "attention_mask": "mask=... is false for padding on the left; texts are padded by themselves",
    "do_sample": "temperature=0 takes the most probable token, any above samples",
    "eos_token_id": _STOP,
    "input_ids": _PROMPTS,
    "inputs": _PROMPTS,
    "max_length": "max_new_tokens=... counts the tokens to add, without the prompt",
    "max_tokens": "max_new_tokens=... counts the tokens to add",
    "n": _SEVERAL,
    "num_return_sequences": _SEVERAL,
    "pad_token_id": "texts are padded by themselves, and left_pad pads tokens",
    "prompt": _PROMPTS,
    "seed": "generator=torch.Generator().manual_seed(...) repeats samples",
    "stop_strings": _STOP,
    "stop_token_ids": _STOP,
    "streamer": "the model's stream(...) gives text as it comes",
    "tokens": _PROMPTS,
    # Options that only some calls have.
    "mask": "texts are padded by themselves",
    "on_tokens": "the model's stream(...) gives text as it comes",
}


def continue_prompts(
    engine: Engine,
    prompts: Prompts | None,
    max_new_tokens: int,
    options: dict[str, Any],
    tokenizer: Callable[[], Tokenizer],
) -> str | list[str] | Tensor:
    """What `SparseModel.generate` gives.

    Args:
        engine: runs the model.
        prompts: a text, several or tokens.
        max_new_tokens: most tokens to add.
        options: those of `lightning_dsmoe.inference.generate`.
        tokenizer: gives the tokenizer when there is a text.
    """
    if isinstance(prompts, str):
        texts = continue_prompts(engine, [prompts], max_new_tokens, options, tokenizer)
        return cast(list[str], texts)[0]
    if _are_texts(prompts):
        _check_names("generate", options, _OPTIONS - _OF_TOKENS_ONLY)
        return continue_texts(engine, tokenizer(), prompts, max_new_tokens, **options)
    _check_names("generate", options, _OPTIONS)
    if prompts is None:
        raise TypeError("generate needs prompts: a text, texts or tokens")
    return generate(engine, cast(Tokens, prompts), max_new_tokens, **options)


def stream_prompt(
    engine: Engine,
    prompt: str,
    max_new_tokens: int,
    options: dict[str, Any],
    tokenizer: Callable[[], Tokenizer],
) -> Iterator[str]:
    """What `SparseModel.stream` gives, of one text; the arguments are those above."""
    if not isinstance(prompt, str):
        raise TypeError(
            "stream needs one text; for tokens, generate calls on_tokens with each new one"
        )
    _check_names("stream", options, _OPTIONS - _OF_TOKENS_ONLY)
    return stream_text(engine, tokenizer(), prompt, max_new_tokens, **options)


def _are_texts(prompts: object) -> TypeGuard[Texts]:
    if not isinstance(prompts, list | tuple) or not prompts:
        return False
    return all(isinstance(prompt, str) for prompt in prompts)


def _check_names(call: str, options: dict[str, Any], allowed: set[str]) -> None:
    """Raise a TypeError that names what to use instead of an option that there is not."""
    for name in options:
        if name not in allowed:
            hint = _HINTS.get(name, f"its options are {', '.join(sorted(allowed))}")
            raise TypeError(f"{call} has no {name!r}; {hint}")
