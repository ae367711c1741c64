"""The model card: a sparse model described for people, with units and three significant digits."""

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.artifact.hashes import FRONTIER
from lightning_dsmoe.routing import Selection, SelectionPlan
from lightning_dsmoe.routing.plan import describe_selections
from lightning_dsmoe.serialization.pruning import Numbers, Remaining, remaining_experts
from lightning_dsmoe.units import compared, digits, percent

_MEASURED = "## Measured"
_KINDS = {"experts": "feed-forward experts", "attention": "attention experts"}
_OMITTED = {"format_version", "sha256"}
_NATS = "nats per token"
_SHARE = "active_share_mean"
_WEIGHTS = {
    "attention.heads": "the attention experts",
    "feed_forward.experts": "the feed-forward experts",
}
_PROVENANCE = (
    "windows",
    "dense",
    "all_experts_error",
    "data",
    "checkpoint_sha256",
    "versions",
    "date",
)
"""Where the figures come from: folded, for those who check them."""
_LEAST = 1e-6
_GAP = ("sparse_loss", "relative_gap", "relative_gap_95")
_LABELS = {
    "tokens": ("predicted tokens", ""),
    "windows": ("windows of the text", ""),
    "dense": ("dense model of the comparison", ""),
    "dense_loss": ("loss of all experts", _NATS),
    "sparse_loss": ("loss", _NATS),
    "relative_gap": ("loss relative to all experts", "%"),
    "relative_gap_95": ("95 % interval of that", "%"),
    "kl": ("KL divergence from all experts, mean over tokens", "nats"),
    "top_1_agreement": ("same most probable next token as all experts", "%"),
    "active_share_mean": ("active share of the hidden parameters, mean over tokens", "%"),
    "active_share_p50": ("active share, median", "%"),
    "active_share_p95": ("active share, 95th percentile", "%"),
    "all_experts_error": ("largest difference from the checkpoint with all experts", "%"),
    "loss_before_quantization": ("loss before quantization", _NATS),
    "routing_agreement": ("choices of experts that quantization keeps", "%"),
    "dropped_mass_mean": ("dropped gate mass, mean", "%"),
    "dropped_mass_max": ("dropped gate mass, max", "%"),
    "error_mean": ("relative error, mean", "%"),
    "error_max": ("relative error, max", "%"),
    "bound_mean": ("its bound, mean", "%"),
    "bound_max": ("its bound, max", "%"),
    "data": ("text", ""),
    "batch_tokens": ("tokens in a batch", ""),
    "fingerprint": ("SHA-256 of its tokens", ""),
    "versions": ("version", ""),
    "val_fraction": ("validation split", "%"),
    "test_fraction": ("test split", "%"),
    "context": ("context length", ""),
    "lightning_dsmoe": ("lightning_dsmoe", ""),
    "checkpoint_sha256": ("SHA-256 of the checkpoint", ""),
}
"""Label and unit of the fields of a certificate; other fields keep their names."""

FRONT_MATTER = """\
---
library_name: lightning_dsmoe
{pipeline}tags:
- mixture-of-experts
- ds-moe
- sparse-inference
---

"""
"""What the Hub reads of a card; the pipeline is a line, or nothing for models of any kind."""

_USE = """\
## Use

```python
from lightning_dsmoe import load_sparse

model = load_sparse(".")
{call}
```
"""


def model_card(
    decoder: Decoder,
    plan: SelectionPlan,
    n_bytes: int,
    quantized: dict[str, int],
    certificate: dict[str, Any],
    *,
    prompt: str | None = None,
    frontier: bool = False,
) -> str:
    """Markdown: the model, the experts that run, measurements and how to use it.

    Args:
        decoder: the model.
        plan: the experts that run.
        n_bytes: bytes of all weights.
        quantized: bytes of each quantised weight, by its name.
        certificate: measurements, by their names.
        prompt: a text that the model's tokenizer can encode; None for a model of tokens only.
        frontier: show the picture of loss against active share that is in the artifact.
    """
    all_remain = (None,) * decoder.n_layers
    remaining = remaining_experts(decoder) or Remaining(all_remain, all_remain)
    selections = decoder.selections(plan)
    experts, attention = map(_experts, decoder.plan_sizes, remaining, selections)
    lines = [
        "# A sparse DS-MoE language model",
        "",
        f"- {decoder.n_layers} layers of width {decoder.d_model}, "
        f"vocabulary of {decoder.vocab_size}, {digits(n_bytes / 2**20)} MiB of weights",
        f"- feed-forward experts: {experts}",
        f"- attention experts: {attention}",
        f"- in 8 bits: {quantized_words(quantized)}",
        "",
        *measured_lines(certificate, frontier),
        _use(prompt),
    ]
    return FRONT_MATTER.format(pipeline="pipeline_tag: text-generation\n") + "\n".join(lines)


def with_measured(card: str, certificate: dict[str, Any], *, frontier: bool = False) -> str:
    """Replace the section "Measured" of a card, or add it at the end; nothing else changes.

    Args:
        card: the card, which people may have edited.
        certificate: measurements, by their names.
        frontier: show the picture of loss against active share that is in the artifact.
    """
    section = re.compile(rf"^{_MEASURED}$.*?(?=^##? |\Z)", re.MULTILINE | re.DOTALL)
    if not section.search(card):
        card = f"{card.rstrip()}\n\n{_MEASURED}"
    measured = "".join(f"{line}\n" for line in measured_lines(certificate, frontier))
    return section.sub(lambda _: measured, card, count=1).rstrip() + "\n"


def measured_lines(certificate: dict[str, Any], frontier: bool) -> list[str]:
    """The section "Measured" of a card."""
    facts = {name: value for name, value in certificate.items() if name not in _OMITTED}
    origin = {name: facts.pop(name) for name in _PROVENANCE if name in facts}
    lines = _headline(facts)
    if _SHARE in facts:  # what that loss costs
        facts = {_SHARE: facts[_SHARE], **facts}
    lines += [f"- {name}: {value}" for name, value in _flat(facts)]
    if "samples" in certificate:  # of any model: only its user knows the unit of its loss
        lines = [line.replace(f" {_NATS}", "") for line in lines]
    picture = [f"![Loss against active share of other plans]({FRONTIER})", ""] if frontier else []
    tables = [line for kind in _KINDS for line in _table(kind, certificate)]
    origins = [f"- {name}: {value}" for name, value in _flat(origin)]
    return [
        *(_MEASURED, "", *(lines or ["Nothing yet."]), "", *picture),
        *_folded("Layers", "What the plan changes in each of them", tables),
        *_folded("Provenance", "Text, versions and hashes", [*origins, ""] if origins else []),
    ]


def _folded(heading: str, summary: str, lines: list[str]) -> list[str]:
    """Lines under a heading, which readers unfold; no heading without lines."""
    if not lines:
        return []
    opening = f"<details><summary>{summary}</summary>"
    return [f"### {heading}", "", opening, "", *lines, "</details>", ""]


def _headline(facts: dict[str, Any]) -> list[str]:
    """The loss and its distance from that of all experts, which leave the facts."""
    loss, gap, interval = map(facts.get, _GAP)
    if not isinstance(loss, float) or not isinstance(gap, float):
        return []
    for name in _GAP:
        facts.pop(name, None)
    text = f"- loss {_format(loss, _NATS)}, {compared(gap)} all experts"
    bounds = interval if isinstance(interval, list | tuple) else ()
    if len(bounds) == 2 and all(isinstance(end, int | float) for end in bounds):
        low, high = sorted(map(abs, bounds))
        same_side = bounds[0] * bounds[1] > 0
        ends = f"{percent(low).removesuffix(' %')} to {percent(high)}"
        ends = ends if same_side else " to ".join(map(compared, bounds))
        if percent(low) != percent(high):
            text += f" (95 % interval {ends})"
    return [text]


def _use(prompt: str | None) -> str:
    if prompt is None:
        return _USE.format(call="tokens = model.generate([0, 1], max_new_tokens=100)")
    usage = _USE.format(call=f"print(model.generate({prompt!r}, max_new_tokens=100))")
    command = f"lightning-dsmoe generate --artifact . --prompt {shlex.quote(prompt)}"
    return f"{usage}\nor `{command}`.\n"


def _flat(facts: dict[str, Any], within: str = "") -> Iterator[tuple[str, str]]:
    """Names and values, those of inner objects too; None and the tables of layers left out."""
    for name, value in facts.items():
        label, unit = _label(name)
        if isinstance(value, dict):
            yield from _flat(value, f"{within}{label}, ")
        elif value is not None and not (name in _KINDS and isinstance(value, list)):
            yield within + label, _format(value, unit)


def _label(name: object) -> tuple[str, str]:
    return _LABELS.get(str(name), (str(name).replace("_", " "), ""))


def _format(value: Any, unit: str = "") -> str:
    """A value with its unit; shares become per cent, and losses have three decimals."""
    if isinstance(value, list | tuple):
        return " to ".join(_format(each, unit) for each in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if unit == "%":
        return percent(value)
    is_tiny = 0 < abs(value) < _LEAST
    text = f"{value:.3f}" if unit == _NATS else f"<{_LEAST:f}" if is_tiny else digits(value)
    return f"{text} {unit}".rstrip()


def _table(kind: str, certificate: dict[str, Any]) -> list[str]:
    """What the plan changes in every layer's mixture, if that was measured."""
    layers = certificate.get(kind)
    if not isinstance(layers, list) or not any(layers):
        return []
    rows = {layer: errors for layer, errors in enumerate(layers) if errors}
    if not any(value != 0 for errors in rows.values() for value in errors.values()):
        return []
    labels = {name: _label(name) for name in next(iter(rows.values()))}
    heads = (f"{label}, {unit}" if unit else label for label, unit in labels.values())
    lines = [f"{_KINDS[kind]}:".capitalize(), ""]
    lines += [f"| layer | {' | '.join(heads)} |", f"|{' ---: |' * (len(labels) + 1)}"]
    for layer, errors in rows.items():
        cells = (_format(errors[n], unit).removesuffix(" %") for n, (_, unit) in labels.items())
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return [*lines, ""]


def quantized_words(n_bytes: dict[str, int]) -> str:
    """What of a decoder is in 8 bits, and how large it is."""
    in_layers = [name for name in n_bytes if name.startswith("blocks.")]
    names = (name.split(".", 2)[2].rpartition(".")[0] for name in in_layers)
    kinds = sorted({_WEIGHTS.get(name, name) for name in names})
    parts = [f"{' and '.join(kinds)} of every layer"] if kinds else []
    if len(n_bytes) > len(in_layers):
        parts.append("the head")
    if not parts:
        return "nothing"
    return f"{' and '.join(parts)}, {digits(sum(n_bytes.values()) / 2**20)} MiB of them"


def _experts(
    counts: Sequence[int | None],
    remaining: Sequence[Numbers | None],
    selections: Sequence[Selection],
) -> str:
    """How many experts the layers have, and which of them run."""
    layers = Counter(map(_size, counts, remaining))
    sizes = ", ".join(f"{size} in {n} layer{'s' * (n > 1)}" for size, n in layers.items())
    routed = [s for s, count in zip(selections, counts, strict=True) if count is not None]
    return f"{sizes}; running: {describe_selections(routed)}" if routed else sizes


def _size(count: int | None, remaining: Numbers | None) -> str:
    if count is None:
        return "no router"
    return str(count) if remaining is None else f"{len(remaining)} left of {count}"
