"""What callbacks need of a model and of a plan, or one line that says what is missing."""

from os import PathLike

from lightning import Callback, LightningModule

from lightning_dsmoe.losses import RoutingLoss
from lightning_dsmoe.routing import RoutedLayer, SelectionPlan, run_plan
from lightning_dsmoe.routing.plan import check_plan
from lightning_dsmoe.routing.running import some_routed_layers

PlanSpec = SelectionPlan | str
"""A plan, or the path of a saved plan."""


def load_plan(owner: str, spec: PlanSpec) -> SelectionPlan:
    """Read the file if `spec` is a path.

    Raises:
        ValueError: if the file is not a plan, naming `owner`.
    """
    if not isinstance(spec, str | PathLike):
        try:
            check_plan(spec)
        except TypeError as error:
            raise TypeError(f"{owner}: {error}") from None
        return spec
    try:
        return SelectionPlan.load(spec)
    except (OSError, ValueError) as error:
        raise ValueError(f"{owner}: {error}") from None


def check_runs(owner: str, plan: SelectionPlan, pl_module: LightningModule) -> None:
    """Check that a model can run under a plan.

    Raises:
        ValueError: if it has no routed layers, is compiled or the plan does not fit it, naming
            `owner`.
    """
    some_routed_layers(owner, pl_module)
    try:
        with run_plan(pl_module, plan):
            pass
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from None


def layers_for(callback: Callback, pl_module: LightningModule) -> dict[str, RoutedLayer]:
    """The routed layers of a model, by name.

    Raises:
        ValueError: if there are none, naming the callback.
    """
    return some_routed_layers(type(callback).__name__, pl_module)


def check_automatic(callback: Callback, pl_module: LightningModule) -> None:
    """Check that Lightning takes the optimizer steps, one after another, that a callback counts.

    Raises:
        ValueError: with manual optimization, naming the callback.
    """
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"{type(callback).__name__} counts optimizer steps, which needs automatic optimization"
        )


def routing_loss_for(callback: Callback, pl_module: LightningModule) -> RoutingLoss:
    """The `RoutingLoss` of a model.

    Raises:
        ValueError: if there is none, or more than one, naming the callback.
    """
    found = {n: m for n, m in pl_module.named_modules() if isinstance(m, RoutingLoss)}
    owner, model = type(callback).__name__, type(pl_module).__name__
    if not found:
        raise ValueError(
            f"{owner}: {model} has no RoutingLoss: add `self.routing_loss = RoutingLoss()` and add "
            "it to the loss"
        )
    if len(found) > 1:
        raise ValueError(
            f"{owner} sets the weights of one RoutingLoss, and {model} has more: {', '.join(found)}"
        )
    return next(iter(found.values()))
