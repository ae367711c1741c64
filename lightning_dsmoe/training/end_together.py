"""Several processes that end together: after a failure of one, and when a signal asks for it."""

import math
import os
import re
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dsmoe.torch_private import default_store

LAUNCHER = "LIGHTNING_DSMOE_LAUNCHER"
"""Variable with the process number of the command line that starts the other ranks."""
GRACE = 20.0
"""Seconds in which a process ends by itself after a failure elsewhere or a signal."""
_POLL = 1.0
_FAILED = "lightning_dsmoe/failed/{}"
"""Key in the store of a group, which one run after another may use, with the number of a run."""
_NOTE = "another process of this run failed first"
_PEER_GONE = re.compile(
    r"gloo.*Connection (closed|reset) by peer|nccl.*remote process exit", re.DOTALL | re.IGNORECASE
)
"""What torch.distributed says; a logger's connection may be reset, too."""


class EndTogether(Callback):
    """Lets all processes of a run end when one does; without effect on a single process.

    A process that fails says so in the store of its group and leaves the group, so that no other
    waits for it: those fail in their next collective, or, if they notice nothing, are ended after
    `GRACE` seconds, as those are whose parent is gone.

    Lightning 2.6.6 handles SIGTERM and SLURM's signal for requeuing by a collective inside of the
    handler, where each process may be in another collective, and may wait for ever. Here a handler
    only takes a note. At the end of each batch the processes agree on whether any of them has one;
    then all save, and stop or go on, at the same place. A signal that is not answered in `GRACE`
    seconds, as in a long validation, ends the process.
    """

    _runs = 0
    """Those of this process, which other ranks have begun as many of."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        """What ended the run; another error may follow, such as of saving what there is."""
        self._signal = 0
        self._signal_time: float | None = None
        self._failure_time: float | None = None
        self._handlers: dict[int, Any] = {}
        self._group: dist.ProcessGroup | None = None
        self._failed = _FAILED.format(0)
        self._done = threading.Event()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._signal, self._signal_time, self._failure_time = 0, None, None
        self.error = None
        self._done.set()  # for the watch of an earlier run
        self._done = threading.Event()
        if trainer.world_size > 1 and dist.is_initialized():
            EndTogether._runs += 1
            self._failed = _FAILED.format(EndTogether._runs)
            # On the host: a GPU would be waited for at the end of each batch.
            self._group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
            watch = threading.Thread(
                target=self._watch,
                args=(default_store().clone(), self._failed, self._done),
                daemon=True,
            )
            watch.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._done.set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take Lightning's place as the handler of signals, after it registered its own."""
        if trainer.world_size == 1 or threading.current_thread() is not threading.main_thread():
            return
        signals = [signal.SIGTERM]
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            signals += [environment.requeue_signal or signal.SIGUSR1]
        for each in signals:
            if signal.getsignal(each) != self._note:
                self._handlers[int(each)] = signal.getsignal(each)
                signal.signal(each, self._note)

    on_sanity_check_start = on_train_start
    on_validation_start = on_test_start = on_predict_start = on_train_start

    def _note(self, number: int, frame: Any) -> None:
        # To stop matters more than to be queued again.
        self._signal = signal.SIGTERM if signal.SIGTERM in (number, self._signal) else number
        if number == signal.SIGTERM and self._signal_time is None:
            self._signal_time = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.world_size == 1 or not dist.is_initialized():
            return
        noted = torch.tensor([self._signal])
        # SIGTERM, 15, is above SIGUSR1, 10, on Linux.
        dist.all_reduce(noted, op=dist.ReduceOp.MAX, group=self._group)
        agreed = int(noted)
        if not agreed:
            return
        self._signal, self._signal_time = 0, None
        if agreed != signal.SIGTERM:
            # Saves on all ranks, and asks for the queue; that of Lightning, if it is not the one
            # that was there. Off the main thread nothing is registered, and others wait to save.
            connector: Any = trainer._signal_connector
            self._handlers.get(agreed, connector._slurm_sigusr_handler_fn)(agreed, None)
            return
        # Saving may take as long as it does, also if this process is told once more: the processes
        # of a job are told one after another.
        self._signal_time = math.inf
        error = SIGTERMException()
        for callback in trainer.checkpoint_callbacks:
            # Before the exception, with which random states of all ranks could not be gathered.
            callback.on_exception(trainer, pl_module, error)
        raise error

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.error = exception
        if trainer.world_size == 1 or not dist.is_initialized():
            return
        # This process ends by itself, after it has written what it may have to: for that there is
        # no limit of time, and `teardown` is not called.
        self._done.set()
        if isinstance(exception, SIGTERMException):  # on all processes
            return
        mine = f"rank {trainer.global_rank}"
        try:
            first = default_store().compare_set(self._failed, "", mine).decode()
        except RuntimeError:  # the process with the store is gone
            first = ""
        if first != mine:
            exception.add_note(_NOTE)
            exception.args = (_NOTE,)  # for those that print it: it says no more than this
        if isinstance(trainer.strategy, ModelParallelStrategy):
            # Without the others there are no weights to save.
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint):
                    callback.save_on_exception = False
        # Callbacks that come next, such as one that saves the weights, then wait for nobody.
        dist.destroy_process_group()

    def _watch(self, store: Any, failed_key: str, done: threading.Event) -> None:
        parent = os.getppid() if _parent_is_of_this_run() else None
        while not done.wait(_POLL):
            now = time.monotonic()
            if parent is not None and os.getppid() != parent:
                os._exit(1)
            if self._failure_time is None:
                try:
                    failed = store.check([failed_key])
                except RuntimeError:
                    failed = True
                self._failure_time = now if failed else None
            for since, code in ((self._failure_time, 1), (self._signal_time, 143)):
                if since is not None and now - since > GRACE:
                    os._exit(code)


def _parent_is_of_this_run() -> bool:
    """Whether the process above started the ranks; else it is a shell, which may be left."""
    return "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get(LAUNCHER) == str(os.getppid())


def is_follow_up(error: BaseException) -> bool:
    """Whether an error only follows from that of another process, which says it itself."""
    return _NOTE in getattr(error, "__notes__", ())


def plainly(message: str) -> str:
    """A message of torch.distributed without frames of C++."""
    message = message.partition("Exception raised from")[0].strip()
    if _PEER_GONE.search(message):
        return f"another process of this run has ended ({message})"
    return message
