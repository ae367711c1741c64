"""Optimizer and schedule settings that changed between a run and the one that resumes it.

PyTorch's and Lightning's checkpoints restore the settings of the old run with its state, and
silently drop those of the new configuration.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from lightning import Trainer
from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Settings = dict[str, Any]
PROGRESS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
"""What a `ReduceLROnPlateau` has seen so far; all else in its state are settings."""


class ResumableSettings:
    """The settings of a run's optimizer and schedule, which hold over those of its checkpoint.

    Lightning loads a checkpoint before the optimizer exists, and restores its state after
    `on_fit_start`; strategies that shard load it between `on_fit_start` and `on_train_start`.
    """

    def __init__(self) -> None:
        self.current: Settings | None = None
        self.forget()

    def forget(self) -> None:
        """Drop what an earlier run has left of a checkpoint."""
        self._checkpoint: dict[str, Any] | None = None
        self._saved: Settings | None = None

    def make_schedule(
        self, optimizer: Optimizer, factory: LRSchedulerCallable | None
    ) -> LRScheduler | ReduceLROnPlateau | None:
        """Make the schedule of a new optimizer, and note the settings of both before any step."""
        groups = _group_settings(optimizer)  # before a schedule changes them
        schedule = None if factory is None else factory(optimizer)
        self.current = {
            "optimizer": _name(optimizer),
            "groups": groups,
            "scheduled": [
                {key: value for key, value in new.items() if key != "lr" and value != old.get(key)}
                for old, new in zip(groups, _group_settings(optimizer), strict=True)
            ],
            "schedule": None if schedule is None else _name(schedule),
            "schedule_settings": _plain({} if schedule is None else schedule.state_dict()),
        }
        return schedule

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Note a checkpoint that a run resumes from, until the optimizer exists."""
        self._checkpoint = checkpoint

    def check(self) -> None:
        """Refuse an optimizer that cannot continue from the state which Lightning restores next.

        Raises:
            ValueError: if it is of another class or has other groups.
        """
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None or self.current is None:
            return
        self._saved = _saved_settings(checkpoint, self.current)
        _changes(self._saved, self.current)
        if self._saved["schedule"] != self.current["schedule"]:
            checkpoint["lr_schedulers"] = []  # a schedule of another class cannot read its state

    def apply(self, trainer: Trainer, factory: LRSchedulerCallable | None) -> None:
        """Let this run's settings hold in the optimizer and schedule that were restored."""
        self.check()  # where a strategy has loaded the checkpoint after `on_fit_start`
        before, now, self._saved = self._saved, self.current, None
        if before is None or now is None or not (changes := _changes(before, now)):
            return
        rank_zero_info(f"Resumed with new settings: {'; '.join(changes)}")
        optimizer = trainer.optimizers[0]
        for group, old, new in zip(
            optimizer.param_groups, before["groups"], now["groups"], strict=True
        ):
            _update(group, {key: new[key] for key in new if new[key] != old.get(key)})
        rates = [[group["lr"] for group in settings["groups"]] for settings in (before, now)]
        if rates[0] != rates[1] or any(
            before[key] != now[key] for key in ("schedule", "schedule_settings", "scheduled")
        ):
            _renew_schedule(trainer, now, factory)


def _group_settings(optimizer: Optimizer) -> list[Settings]:
    return [
        {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]


def _saved_settings(checkpoint: Mapping[str, Any], now: Settings) -> Settings:
    """The settings of the run that a checkpoint is of.

    Checkpoints of version 0.1 do not hold them: their parameter groups are compared then, and a
    schedule, of which these only show that there was one, counts as the same.

    Args:
        checkpoint: the checkpoint.
        now: the settings of this run.

    Raises:
        ValueError: if the file does not hold such settings.
    """
    saved = checkpoint.get("optimizer_settings")
    if saved is None:
        if not (states := checkpoint.get("optimizer_states")):
            return now  # a file of weights alone, or of shards whose optimizer is in other files
        groups = [dict(group) for group in states[0]["param_groups"]]
        had_schedule = any("initial_lr" in group for group in groups)
        for group in groups:
            group["lr"] = group.pop("initial_lr", group["lr"])
        pairs = zip(groups, now["groups"], strict=False)  # PyTorch refuses other numbers of groups
        settings = [{key: group.get(key) for key in new} for group, new in pairs]
        schedule = now["schedule"] or "a schedule" if had_schedule else None
        return {**now, "groups": _plain(settings), "schedule": schedule}
    if not (
        isinstance(saved, dict)
        and saved.keys() == now.keys()
        and repr(_plain(saved)) == repr(saved)
        and all(
            isinstance(saved[name], list) and all(isinstance(group, dict) for group in saved[name])
            for name in ("groups", "scheduled")
        )
        and isinstance(saved["schedule_settings"], dict)
    ):
        raise ValueError(f"optimizer_settings of the checkpoint are invalid: {saved!r:.200}")
    return saved


def _changes(before: Settings, now: Settings) -> list[str]:
    """Each difference as "name was …, is …".

    Raises:
        ValueError: if the optimizer is of another class or has other groups, whose state does not
            match.
    """
    if before["optimizer"] != now["optimizer"]:
        raise ValueError(
            f"the checkpoint's optimizer is {before['optimizer']}, this run's is "
            f"{now['optimizer']}, which cannot continue from its state: name the former, or start "
            "a new run"
        )
    if len(before["groups"]) != len(now["groups"]):
        raise ValueError(
            f"the checkpoint's optimizer has {len(before['groups'])} parameter groups, this run's "
            f"has {len(now['groups'])}"
        )
    pairs = [*zip(before["groups"], now["groups"], strict=True)]
    if before["schedule"] == now["schedule"]:
        pairs += zip(_schedule_settings(before), _schedule_settings(now), strict=False)
    changes = [
        f"{key} was {old.get(key)}, is {new.get(key)}"
        for old, new in pairs
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]
    if before["schedule"] != now["schedule"]:
        changes.append(f"lr_scheduler was {before['schedule']}, is {now['schedule']}")
    return list(dict.fromkeys(changes))


def _renew_schedule(trainer: Trainer, now: Settings, factory: LRSchedulerCallable | None) -> None:
    """Replace the schedule by one of this run's settings, brought to the step that was reached."""
    for group, new in zip(trainer.optimizers[0].param_groups, now["groups"], strict=True):
        group.pop("initial_lr", None)
        _update(group, {key: value for key, value in new.items() if value is not None})
    if factory is None or not (configs := trainer.lr_scheduler_configs):
        return
    with warnings.catch_warnings():  # PyTorch warns of a schedule stepped before its optimizer
        warnings.simplefilter("ignore", UserWarning)
        schedule: Any = factory(trainer.optimizers[0])
        restored = configs[0].scheduler
        if not isinstance(schedule, ReduceLROnPlateau):
            for _ in range(trainer.global_step):
                schedule.step()
        elif isinstance(restored, ReduceLROnPlateau):  # has no rate of a step: its progress stays
            vars(schedule).update({key: getattr(restored, key) for key in PROGRESS})
    configs[0].scheduler = schedule


def _update(group: Settings, settings: Settings) -> None:
    """Set plain values in the types that the optimizer keeps them in."""
    for key, value in settings.items():
        group[key] = tuple(value) if isinstance(group.get(key), tuple) else value


def _schedule_settings(settings: Settings) -> list[Settings]:
    """Settings of a schedule, and those it put into groups, where `OneCycleLR` keeps all of its."""
    rates = ("base_lrs", "_last_lr")  # which groups name as `lr`
    own = {k: v for k, v in settings["schedule_settings"].items() if k not in rates}
    groups = settings["scheduled"]
    return [own, *({"lr" if k == "initial_lr" else k: v for k, v in g.items()} for g in groups)]


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
