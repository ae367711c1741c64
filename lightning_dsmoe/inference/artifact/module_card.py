"""The card of a sparse model that is not this library's."""

from typing import Any

from torch import nn

from lightning_dsmoe.inference.artifact.model_card import FRONT_MATTER, measured_lines
from lightning_dsmoe.routing import SelectionPlan, routed_layers
from lightning_dsmoe.routing.plan import describe
from lightning_dsmoe.units import digits

_USE = """\
## Use

No file holds the code of the model. Build one like it and load the weights into it:

```python
from lightning_dsmoe import load_sparse

model = load_sparse(".", model={name}(...))
```
"""


def module_card(
    model: nn.Module,
    plan: SelectionPlan,
    n_bytes: int,
    quantized: dict[str, int],
    certificate: dict[str, Any],
    *,
    frontier: bool = False,
) -> str:
    """Markdown: the model, the experts that run, measurements and how to load it.

    Args:
        model: the packed model.
        plan: the experts that run.
        n_bytes: bytes of all weights.
        quantized: bytes of each quantised weight, by its name.
        certificate: measurements, by their names.
        frontier: show the picture of loss against active share that is in the artifact.
    """
    layers = routed_layers(model)
    name = type(model).__name__
    in_8_bits = "nothing"
    if quantized:
        n_quantized = digits(sum(quantized.values()) / 2**20)
        in_8_bits = f"the experts of routed layers, {n_quantized} MiB of them"
    lines = [
        f"# A sparse {name}",
        "",
        f"- {len(layers)} routed layer{'s' * (len(layers) > 1)}, "
        f"{digits(n_bytes / 2**20)} MiB of weights",
        f"- running: {describe(plan, layers)}",
        f"- in 8 bits: {in_8_bits}",
        "",
        *measured_lines(certificate, frontier),
        _USE.format(name=name),
    ]
    return FRONT_MATTER.format(pipeline="") + "\n".join(lines)
