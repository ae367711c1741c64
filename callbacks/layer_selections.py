"""How a configuration names a plan."""

from dataclasses import dataclass

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.routing import AllExperts, Selection, SelectionPlan


@dataclass(frozen=True)
class LayerSelections:
    """The same selections for every layer of a model.

    Args:
        experts: selection of the feed-forward experts.
        attention: selection of the attention experts.

    Examples:
        >>> from lightning_dsmoe import Threshold, TopK
        >>> from lightning_dsmoe.callbacks import LayerSelections
        >>> LayerSelections(experts=Threshold(0.1), attention=TopK(1)).attention.k
        1
    """

    experts: Selection = AllExperts()
    attention: Selection = AllExperts()


PlanSpec = LayerSelections | SelectionPlan | str
"""Selections for all layers, a plan, or the path of a saved plan."""


def load_plan(owner: str, spec: PlanSpec) -> LayerSelections | SelectionPlan:
    """Read the file if `spec` is a path.

    Raises:
        ValueError: if the file is not a plan, naming `owner`.
    """
    if not isinstance(spec, str):
        return spec
    try:
        return SelectionPlan.load(spec)
    except (OSError, ValueError) as error:
        raise ValueError(f"{owner}: {error}") from None


def plan_for(owner: str, spec: LayerSelections | SelectionPlan, decoder: Decoder) -> SelectionPlan:
    """The plan that `spec` means for a decoder.

    Raises:
        ValueError: if it does not fit the decoder, naming `owner`.
    """
    if isinstance(spec, LayerSelections):
        spec = SelectionPlan.uniform(decoder.n_layers, **vars(spec))
    try:
        spec.check(*decoder.plan_sizes)
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from None
    return spec
