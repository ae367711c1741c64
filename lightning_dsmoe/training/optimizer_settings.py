"""Optimizer and schedule settings that changed between a run and the one that resumes it.

PyTorch's and Lightning's checkpoints restore the settings of the old run with its state, without
a word about those that were asked for.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Settings = dict[str, Any]
PROGRESS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
"""What a `ReduceLROnPlateau` has seen so far; all else in its state are settings."""


def group_settings(optimizer: Optimizer) -> list[Settings]:
    """Settings of each parameter group, as configured: read before a schedule changes them."""
    return [
        {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]


def describe(
    optimizer: Optimizer, groups: list[Settings], schedule: LRScheduler | ReduceLROnPlateau | None
) -> Settings:
    """Plain data of a new optimizer and its schedule, before any step.

    Args:
        optimizer: the optimizer.
        groups: its `group_settings` from before the schedule was made.
        schedule: the schedule, if any.
    """
    state = {} if schedule is None else schedule.state_dict()
    return {
        "optimizer": _name(optimizer),
        "groups": groups,
        "scheduled": [
            {key: value for key, value in new.items() if key != "lr" and value != old.get(key)}
            for old, new in zip(groups, group_settings(optimizer), strict=True)
        ],
        "schedule": None if schedule is None else _name(schedule),
        "schedule_settings": {key: _plain(value) for key, value in state.items()},
    }


def saved_settings(checkpoint: Mapping[str, Any], now: Settings) -> Settings:
    """What `describe` returned in the run that a checkpoint is of.

    Checkpoints of version 0.1 do not keep it; what their parameter groups tell is compared then,
    and a schedule, of which they tell that there was one, counts as the same.

    Args:
        checkpoint: the checkpoint.
        now: what `describe` returned in this run.

    Raises:
        ValueError: if the file does not hold such settings.
    """
    found = checkpoint.get("optimizer_settings")
    if found is None:
        if not (states := checkpoint.get("optimizer_states")):
            return now  # a file of weights alone, or of shards whose optimizer is in other files
        groups = [dict(group) for group in states[0]["param_groups"]]
        had_schedule = any("initial_lr" in group for group in groups)
        for group in groups:
            group["lr"] = group.pop("initial_lr", group["lr"])
        kept = [{key: group.get(key) for key in new} for group, new in zip(groups, now["groups"])]  # noqa: B905 - other numbers are told by PyTorch
        schedule = now["schedule"] or "a schedule" if had_schedule else None
        return {**now, "groups": _plain(kept), "schedule": schedule}
    is_settings = isinstance(found, dict) and found.keys() == now.keys()
    if not is_settings or not (
        repr(_plain(found)) == repr(found)
        and all(
            isinstance(found[name], list) and all(isinstance(group, dict) for group in found[name])
            for name in ("groups", "scheduled")
        )
        and isinstance(found["schedule_settings"], dict)
    ):
        raise ValueError(f"optimizer_settings of the checkpoint are none: {found!r:.200}")
    settings: Settings = found
    return settings


def changed_settings(before: Settings, now: Settings) -> list[str]:
    """Each difference as "name was …, is …".

    Args:
        before: what `describe` returned in the run that was saved.
        now: what it returned in this one.

    Raises:
        ValueError: if the optimizer is of another class or has other groups, whose state does not
            fit.
    """
    if before["optimizer"] != now["optimizer"]:
        raise ValueError(
            f"the checkpoint's optimizer is {before['optimizer']}, this run's is "
            f"{now['optimizer']}, which cannot go on from its state: name the former, or start a "
            "new run"
        )
    if len(before["groups"]) != len(now["groups"]):
        raise ValueError(
            f"the checkpoint's optimizer has {len(before['groups'])} parameter groups, this run's "
            f"has {len(now['groups'])}"
        )
    pairs = [*zip(before["groups"], now["groups"], strict=True)]
    if before["schedule"] == now["schedule"]:
        pairs.append((_schedule_settings(before), _schedule_settings(now)))
        pairs += zip(_scheduled(before), _scheduled(now), strict=False)
    changes = [
        f"{key} was {old.get(key)}, is {new.get(key)}"
        for old, new in pairs
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]
    if before["schedule"] != now["schedule"]:
        changes.append(f"lr_scheduler was {before['schedule']}, is {now['schedule']}")
    return list(dict.fromkeys(changes))


def apply_settings(
    before: Settings,
    now: Settings,
    optimizer: Optimizer,
    schedule: LRScheduler | ReduceLROnPlateau | None,
    make_schedule: LRSchedulerCallable | None,
    steps: int,
) -> Any:
    """Let the settings of this run hold in an optimizer that was restored; returns its schedule.

    Args:
        before: what `describe` returned in the run that was saved.
        now: what it returned in this one.
        optimizer: the optimizer, with the state and the settings of the checkpoint.
        schedule: its schedule, likewise.
        make_schedule: makes this run's schedule.
        steps: optimizer steps taken so far, to which a new schedule is brought.
    """
    for group, old, new in zip(
        optimizer.param_groups, before["groups"], now["groups"], strict=True
    ):
        group.update(
            {key: _as_before(group, key, new[key]) for key in new if new[key] != old.get(key)}
        )
    rates = [[group["lr"] for group in settings["groups"]] for settings in (before, now)]
    if rates[0] == rates[1] and all(
        before[key] == now[key] for key in ("schedule", "schedule_settings", "scheduled")
    ):
        return schedule
    for group, new in zip(optimizer.param_groups, now["groups"], strict=True):
        group.pop("initial_lr", None)
        known = {key: value for key, value in new.items() if value is not None}
        group.update({key: _as_before(group, key, value) for key, value in known.items()})
    if make_schedule is None:
        return None
    with warnings.catch_warnings():  # PyTorch warns of a schedule stepped before its optimizer
        warnings.simplefilter("ignore", UserWarning)
        made = make_schedule(optimizer)
        if isinstance(made, ReduceLROnPlateau):  # has no rate of a step: what it has seen stays
            if isinstance(schedule, ReduceLROnPlateau):
                vars(made).update({key: getattr(schedule, key) for key in PROGRESS})
        else:
            for _ in range(steps):
                made.step()
    return made


def _as_before(group: Settings, key: str, value: Any) -> Any:
    """A plain value in the type that the optimizer keeps it in."""
    return tuple(value) if isinstance(group.get(key), tuple) else value


def _schedule_settings(settings: Settings) -> Settings:
    """Settings of a schedule but for the rates, which its groups name as `lr`."""
    of_groups = ("base_lrs", "_last_lr")
    return {k: v for k, v in settings["schedule_settings"].items() if k not in of_groups}


def _scheduled(settings: Settings) -> list[Settings]:
    """What a schedule put into the groups, where `OneCycleLR` keeps all of its settings."""
    return [
        {"lr" if key == "initial_lr" else key: value for key, value in group.items()}
        for group in settings["scheduled"]
    ]


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else None
