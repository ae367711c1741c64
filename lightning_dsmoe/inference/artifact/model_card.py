"""A sparse model described for people."""

import shlex
from collections import Counter
from collections.abc import Iterator
from typing import Any

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.serialization.pruning import Numbers, Remaining, remaining_experts

_MEASURED = "## Measured"
_MIXTURES = {"experts": "feed-forward experts", "attention": "attention experts"}


def model_card(
    decoder: Decoder,
    plan: SelectionPlan,
    n_bytes: int,
    quantized: dict[str, int],
    certificate: dict[str, Any],
    *,
    prompt: str | None = None,
) -> str:
    """Markdown: what the model is, which experts run, what was measured, how to use it.

    Args:
        decoder: the model.
        plan: the experts that run.
        n_bytes: bytes of all weights.
        quantized: bytes of each quantised weight, by its name.
        certificate: what was measured, by its name.
        prompt: a text that the model's tokenizer can read; None for a model of tokens only.
    """
    all_remain = (None,) * decoder.n_layers
    remaining = remaining_experts(decoder) or Remaining(all_remain, all_remain)
    experts, attention = (
        list(map(_size, sizes, left))
        for sizes, left in zip(decoder.plan_sizes, remaining, strict=True)
    )
    lines = [
        "# A sparse DS-MoE language model",
        "",
        f"- {decoder.n_layers} layers of width {decoder.d_model}, "
        f"vocabulary of {decoder.vocab_size}, {n_bytes / 2**20:.1f} MiB of weights",
        f"- feed-forward experts: {_sizes(experts)}; running: {_selections(plan.experts)}",
        f"- attention experts: {_sizes(attention)}; running: {_selections(plan.attention)}",
        f"- in 8 bits: {_quantized(quantized)}",
        "",
        *_measured(certificate),
        *_use(prompt),
    ]
    return "\n".join(lines)


def with_measured(card: str, certificate: dict[str, Any]) -> str:
    """A card with what was measured in place of what stood there, or at the end; no other change.

    Args:
        card: the card, which people may have edited.
        certificate: what was measured, by its name.
    """
    lines = card.rstrip().splitlines()
    if _MEASURED not in lines:
        lines += ["", _MEASURED]
    start = lines.index(_MEASURED)
    rest = next(
        (n for n in range(start + 1, len(lines)) if lines[n].startswith(("# ", "## "))), len(lines)
    )
    lines[start:rest] = _measured(certificate)
    return "\n".join(lines).rstrip() + "\n"


def _measured(certificate: dict[str, Any]) -> list[str]:
    facts = [
        f"- {name}: {_format(value)}"
        for name, value in _flat(certificate)
        if name != "format_version"
    ]
    tables = [line for kind in _MIXTURES for line in _table(kind, certificate)]
    return [_MEASURED, "", *(facts or ["Nothing yet."]), "", *tables]


def _use(prompt: str | None) -> list[str]:
    call = "tokens = model.generate([0, 1], max_new_tokens=100)"
    command = []
    if prompt is not None:
        call = f"print(model.generate({prompt!r}, max_new_tokens=100))"
        command = [
            f"or `lightning-dsmoe generate --artifact . --prompt {shlex.quote(prompt)}`.",
            "",
        ]
    return [
        "## Use",
        "",
        "```python",
        "from lightning_dsmoe import load_sparse",
        "",
        'model = load_sparse(".")',
        call,
        "```",
        "",
        *command,
    ]


def _flat(certificate: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values, those of what is inside another object too; None and tables left out."""
    for name, value in certificate.items():
        if isinstance(value, dict):
            yield from ((f"{name}, {inner}", each) for inner, each in _flat(value))
        elif value is not None and not (name in _MIXTURES and isinstance(value, list)):
            yield name, value


def _format(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " to ".join(map(_format, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(kind: str, certificate: dict[str, Any]) -> list[str]:
    """What the plan changes in every layer's mixture, if that was measured."""
    layers = certificate.get(kind)
    if not isinstance(layers, list) or not any(layers):
        return []
    rows = {layer: errors for layer, errors in enumerate(layers) if errors}
    names = list(next(iter(rows.values())))
    return [
        f"What the plan changes in the {_MIXTURES[kind]} of each layer:",
        "",
        f"| layer | {' | '.join(name.replace('_', ' ') for name in names)} |",
        f"|{' ---: |' * (len(names) + 1)}",
        *(
            f"| {layer} | {' | '.join(_format(errors[name]) for name in names)} |"
            for layer, errors in rows.items()
        ),
        "",
    ]


def _quantized(n_bytes: dict[str, int]) -> str:
    in_layers = [name for name in n_bytes if name.startswith("blocks.")]
    kinds = sorted({name.split(".", 2)[2] for name in in_layers})
    parts = [f"{', '.join(kinds)} of every layer"] if kinds else []
    if len(n_bytes) > len(in_layers):
        parts.append("the head")
    if not parts:
        return "nothing"
    return f"{' and '.join(parts)}, {sum(n_bytes.values()) / 2**20:.1f} MiB of them"


def _size(count: int | None, remaining: Numbers | None) -> str:
    if count is None:
        return "no router"
    return str(count) if remaining is None else f"{len(remaining)} left of {count}"


def _sizes(sizes: list[str]) -> str:
    return ", ".join(f"{size} in {layers} layers" for size, layers in Counter(sizes).items())


def _selections(selections: tuple[object, ...]) -> str:
    return ", ".join(f"{s} in {layers} layers" for s, layers in Counter(selections).items())
