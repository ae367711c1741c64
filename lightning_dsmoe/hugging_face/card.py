"""The README.md of an exported model, for people and for the Hub."""

from typing import Any

from lightning_dsmoe.hugging_face.export_source import ExportSource
from lightning_dsmoe.hugging_face.targets import StockClass
from lightning_dsmoe.inference.artifact.model_card import measured_lines
from lightning_dsmoe.routing import routed_layers
from lightning_dsmoe.routing.plan import describe
from lightning_dsmoe.units import digits

# JSON is YAML, so no value needs quoting rules of its own.
_FRONT_MATTER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- ds-moe
- mixture-of-experts
- lightning-dsmoe
---
"""
_LOAD = """\
```python
from transformers import AutoModelForCausalLM{also}

model = AutoModelForCausalLM.from_pretrained("."{trust})
{then}```
"""
_TEXT = """\
tokenizer = AutoTokenizer.from_pretrained(".")
prompt = tokenizer({prompt!r}, return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100)[0]))
"""


def export_card(
    source: ExportSource,
    stock: StockClass | None,
    certificate: dict[str, Any],
    notes: list[str],
    *,
    prompt: str | None = None,
    frontier: bool = False,
) -> str:
    """Markdown with the front matter of the Hub.

    Args:
        source: the model.
        stock: its class in transformers, None for the class in the directory.
        certificate: measurements of the model, by their names; empty for none.
        notes: sentences about what is particular.
        prompt: a text that the tokenizer in the directory can encode; None without one.
        frontier: show the picture of loss against active share in the directory.
    """
    decoder = source.decoder
    n_weights = sum(parameter.numel() for parameter in decoder.parameters())
    runs = describe(source.plan, routed_layers(decoder))
    loads = f"`{stock.architecture}` of transformers" if stock else "a class of its own, below"
    lines = [
        f"{_FRONT_MATTER}# A DS-MoE language model",
        "",
        "A mixture of experts that was trained with all its experts on every token and runs those "
        "that matter ([arXiv 2404.05567](https://arxiv.org/abs/2404.05567)), exported by "
        "lightning_dsmoe.",
        "",
        f"- {decoder.n_layers} layers of width {decoder.d_model}, vocabulary of "
        f"{decoder.vocab_size:,}, {digits(n_weights / 1e6)} M parameters",
        f"- experts that run: {runs}",
        f"- class: {loads}",
        "",
        "## Load",
        "",
        _load(stock, prompt),
    ]
    if stock is None:
        lines += ["The code of the class is in this directory; read it before you trust it.", ""]
    notes = [*notes, *_notes(source, stock)]
    lines += [line for note in notes for line in (f"- {note}", "")]
    if certificate:
        lines += measured_lines(certificate, frontier)
    return "\n".join(lines).rstrip() + "\n"


def _load(stock: StockClass | None, prompt: str | None) -> str:
    return _LOAD.format(
        also="" if prompt is None else ", AutoTokenizer",
        trust="" if stock else ", trust_remote_code=True",
        then="" if prompt is None else _TEXT.format(prompt=prompt),
    )


def _notes(source: ExportSource, stock: StockClass | None) -> list[str]:
    notes = []
    if source.quantized:
        notes.append(
            "The weights were in 8 bits and are written as the numbers that those stand for, so "
            "the directory is larger than the model that was measured."
        )
    if source.context_length is None:
        notes.append(
            "How long the texts of training were is not recorded; `max_position_embeddings` is a "
            "default."
        )
    if stock is not None and source.decoder.embedding.weight.itemsize < 4:
        notes.append(
            "lightning_dsmoe scores experts in float32, transformers in the type of the weights: "
            "choices of experts near a tie can differ."
        )
    return notes
