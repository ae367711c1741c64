"""The plan that a model loses least with."""

from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_dsmoe.analysis import PlanResult
from lightning_dsmoe.analysis import calibrate as search_plan
from lightning_dsmoe.commands.evaluation_setup import open_trained
from lightning_dsmoe.commands.result_table import result_table
from lightning_dsmoe.files import check_file
from lightning_dsmoe.routing import routed_layers
from lightning_dsmoe.routing.plan import describe
from lightning_dsmoe.units import percent


def calibrate(
    ckpt_path: str,
    budget: float | str | None = None,
    max_loss_increase: float | str | None = None,
    output: str = "plan.json",
    fixed: bool = False,
    **options: Any,
) -> None:
    """Search for a plan: which experts to run in each layer for the lowest loss.

    The plan is found on the first half of the text. The second half is unseen: on it the plan is
    compared with all experts and with the best uniform plan, which treats all layers alike.

    Args:
        ckpt_path: checkpoint of `fit`.
        budget: largest active share (share of the hidden parameters, mean over tokens), such as
            0.2 or 20%; under thresholds the measured share can be slightly larger.
        max_loss_increase: instead of a budget, the largest increase of the loss, such as 0.5%.
        output: JSON file of the plan.
        fixed: fixed numbers of experts (top-k), the same for all tokens, instead of thresholds.
            Without it, a uniform plan is used if it is clearly better: top-k in all layers, or
            top-k for attention experts and a threshold for feed-forward experts.
        options: of the text and the device, see `open_trained`.

    Raises:
        ValueError: if not exactly one of budget and max_loss_increase is given or it cannot be met,
            or the checkpoint or the text is invalid.
    """
    if (budget is None) == (max_loss_increase is None):
        raise ValueError("calibrate needs either --budget or --max_loss_increase")
    most = None if budget is None else _share("budget", budget, "0.2 or 20%")
    if most is not None and not 0 < most <= 1:
        raise ValueError(f"budget must be a share above 0 and at most 1, got {budget}")
    increase = None
    if max_loss_increase is not None:
        increase = _share("max_loss_increase", max_loss_increase, "0.5% or 0.005")
        if not 0 <= increase < 10:
            raise ValueError(
                f"max_loss_increase must be from 0 to 1000%, got {max_loss_increase!r}"
            )
    check_file(output, ckpt_path)
    model, counts, text, _ = open_trained(ckpt_path, **options)
    with Console(stderr=True).status("reading the text") as status:
        found = search_plan(
            model,
            text,
            counts=counts,
            budget=most,
            max_loss_increase=increase,
            fixed=fixed,
            on_progress=status.update,
        )
    found.plan.save(output)
    layers, uniform = routed_layers(model.decoder), found.uniform
    rows = [("all experts", found.dense), ("calibrated", found.result)]
    if uniform is not None:
        rows.append(("best uniform plan", uniform.result))
    Console().print(result_table("Plans on unseen text", rows, found.dense))
    print(f"Calibrated: {describe(found.plan, layers)}.")
    if uniform is not None:
        print(f"Best uniform plan: {describe(uniform.plan, layers)}.")
        print(_comparison(found.result, uniform.result))
    print(f"The plan is in {Path(output)}")


def _share(option: str, given: float | str, example: str) -> float:
    """A number, which may be in per cent."""
    number, sign, rest = str(given).strip().partition("%")
    try:
        if rest:
            raise ValueError
        return float(number) / (100 if sign else 1)
    except ValueError:
        raise ValueError(f"{option} must be like {example}, got {given!r}") from None


def _comparison(calibrated: PlanResult, uniform: PlanResult) -> str:
    gain, error = (nats / sum(uniform.window_losses) for nats in calibrated.gain_over(uniform))
    better = "better" if gain >= 0 else "worse"
    line = f"On unseen text it is {percent(abs(gain))} {better} than the best uniform plan"
    return f"{line} (standard error {percent(error)})" if len(uniform.window_losses) > 1 else line
