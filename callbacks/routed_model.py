"""What callbacks need from a model: the one place where they reach into it."""

from typing import Any, Protocol

from lightning import Callback, LightningModule

from lightning_dsmoe.decoder import Decoder, DecoderOutput
from lightning_dsmoe.routing import SelectionPlan

MI_WEIGHTS = {"experts": "expert_mi_weight", "attention": "attention_mi_weight"}
"""Attribute of a model with the weight of the mutual-information loss, by kind of expert."""


class RoutedModel(Protocol):
    """A LightningModule with routed layers, such as `DSMoELanguageModel`.

    Its training, validation and test steps return a dict with "loss", with "routings", the detached
    `Routings` of all layers, and with "mask", the tokens `[B, T]` that count.

    Args:
        decoder: has the routed layers.
        plan: the plan that training runs.
        expert_mi_weight: weight of the mutual-information loss of each feed-forward router.
        attention_mi_weight: weight of that of each attention router.
    """

    decoder: Decoder
    plan: SelectionPlan
    expert_mi_weight: float
    attention_mi_weight: float

    def __call__(self, tokens: Any, plan: SelectionPlan | None = None) -> DecoderOutput:
        """Logits and routings of tokens under a plan."""
        ...


def routed_model(callback: Callback, pl_module: LightningModule, *needed: str) -> RoutedModel:
    """The model as a callback sees it.

    Args:
        callback: for whom it is.
        pl_module: the model.
        needed: the attributes of `RoutedModel` that the callback uses.

    Raises:
        TypeError: if the model does not have them.
    """
    model: Any = pl_module
    decodes = isinstance(getattr(model, "decoder", None), Decoder)
    missing = [n for n in needed if not (decodes if n == "decoder" else hasattr(model, n))]
    if missing:
        raise TypeError(
            f"{type(callback).__name__} needs a model with routed layers, such as "
            f"DSMoELanguageModel; {type(model).__name__} has no {', '.join(missing)}"
        )
    routed: RoutedModel = model
    return routed
