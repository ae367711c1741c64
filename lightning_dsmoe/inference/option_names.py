"""Options of `generate` by the names that they have elsewhere."""

from collections.abc import Collection, Iterable

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


def check_names(call: str, names: Iterable[str], allowed: Collection[str]) -> None:
    """Raise a TypeError that names what to use instead, if an option is not one of those allowed.

    Args:
        call: what was called.
        names: names of the options given.
        allowed: names of the options there are.
    """
    for name in names:
        if name not in allowed:
            hint = _HINTS.get(name, f"its options are {', '.join(sorted(allowed))}")
            raise TypeError(f"{call} has no {name!r}; {hint}")
