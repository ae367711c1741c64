"""Names of the options with which a sparse model continues prompts."""

import inspect
from typing import Any

from lightning_dsmoe.inference.generation import generate

_OPTIONS = {*inspect.signature(generate).parameters} - {"model", "tokens"}
_OF_TOKENS_ONLY = {"mask", "on_tokens"}

_HINTS = {
    "attention_mask": "mask=... is false for padding on the left; texts are padded by themselves",
    "do_sample": "temperature=0 takes the most probable token, any above samples",
    "eos_token_id stop_strings stop_token_ids": (
        "stop=... takes texts for prompts of text, and tokens for tokens"
    ),
    "input_ids inputs prompt tokens": "the prompts are its first argument: text, texts or tokens",
    "mask": "texts are padded by themselves",
    "max_length": "max_new_tokens=... counts the tokens to add, without the prompt",
    "max_tokens": "max_new_tokens=... counts the tokens to add",
    "n num_return_sequences": "give the prompt as often as you want continuations of it",
    "on_tokens streamer": "the model's stream(...) gives text as it comes",
    "pad_token_id": "texts are padded by themselves, and left_pad pads tokens",
    "seed": "generator=torch.Generator().manual_seed(...) repeats samples",
}
"""What to use instead of options of other libraries, and of those that only tokens have."""


def check_names(call: str, options: dict[str, Any], *, of_text: bool) -> None:
    """Raise a TypeError that names what to use instead of an option that there is not."""
    allowed = _OPTIONS - _OF_TOKENS_ONLY if of_text else _OPTIONS
    hints = {name: hint for names, hint in _HINTS.items() for name in names.split()}
    for name in options:
        if name not in allowed:
            hint = hints.get(name, f"its options are {', '.join(sorted(allowed))}")
            raise TypeError(f"{call} has no {name!r}; {hint}")
