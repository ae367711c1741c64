"""A sparse model described for people."""

from collections import Counter
from typing import Any

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.routing import SelectionPlan


def model_card(
    decoder: Decoder,
    plan: SelectionPlan,
    n_bytes: int,
    quantized: dict[str, int],
    certificate: dict[str, Any],
) -> str:
    """Markdown: what the model is, which experts run, what was measured, how to use it.

    Args:
        decoder: the model.
        plan: the experts that run.
        n_bytes: bytes of all weights.
        quantized: bytes of each quantised weight, by its name.
        certificate: what was measured, by its name.
    """
    experts, attention = decoder.plan_sizes
    lines = [
        "# A sparse DS-MoE language model",
        "",
        f"- {decoder.n_layers} layers of width {decoder.d_model}, "
        f"vocabulary of {decoder.vocab_size}, {n_bytes / 2**20:.1f} MiB of weights",
        f"- feed-forward experts: {_sizes(experts)}; running: {_selections(plan.experts)}",
        f"- attention experts: {_sizes(attention)}; running: {_selections(plan.attention)}",
        f"- in 8 bits: {_quantized(quantized)}",
        "",
        "## Measured",
        "",
        *([f"- {name}: {value}" for name, value in certificate.items()] or ["Nothing yet."]),
        "",
        "## Use",
        "",
        "```python",
        "from lightning_dsmoe import load_sparse",
        "",
        'model = load_sparse(".")',
        "tokens = model.generate(prompt, max_new_tokens=100)",
        "```",
        "",
        'or `lightning-dsmoe generate --artifact . --prompt "Once"`.',
        "",
    ]
    return "\n".join(lines)


def _quantized(n_bytes: dict[str, int]) -> str:
    in_layers = [name for name in n_bytes if name.startswith("blocks.")]
    kinds = sorted({name.split(".", 2)[2] for name in in_layers})
    parts = [f"{', '.join(kinds)} of every layer"] if kinds else []
    if len(n_bytes) > len(in_layers):
        parts.append("the head")
    if not parts:
        return "nothing"
    return f"{' and '.join(parts)}, {sum(n_bytes.values()) / 2**20:.1f} MiB of them"


def _sizes(counts: list[int | None]) -> str:
    return ", ".join(
        f"{'no router' if count is None else count} in {layers} layers"
        for count, layers in Counter(counts).items()
    )


def _selections(selections: tuple[object, ...]) -> str:
    return ", ".join(f"{s} in {layers} layers" for s, layers in Counter(selections).items())
