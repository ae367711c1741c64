"""How fast a model trains."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_dsmoe.callbacks.reporting import log_scalars
from lightning_dsmoe.callbacks.step_flops import StepFlops
from lightning_dsmoe.peak_flops import peak_flops

_DTYPES = {
    "bf16": torch.bfloat16,
    "16": torch.float16,
    "32": torch.float32,
}
"""Types of the factors in matrix products, by the first part of a Trainer's `precision`."""


def batch_tokens(batch: Any) -> int:
    """Tokens of a batch: those of "input_ids", else of its first tensor, if that holds integers.

    For a tensor of anything else, such as images, they are its samples. Padding counts.

    Examples:
        >>> import torch
        >>> batch_tokens({"input_ids": torch.zeros(2, 8, dtype=torch.long)})
        16
        >>> batch_tokens((torch.zeros(2, 3, 32, 32), torch.tensor([1, 0])))
        2
    """
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        return int(batch["input_ids"].numel())
    first = next(_tensors(batch), None)
    if first is None:
        return 0
    is_tokens = not (first.is_floating_point() or first.is_complex())
    return first.numel() if is_tokens or first.ndim == 0 else len(first)


class ThroughputMonitor(Callback):
    """Logs tokens and floating-point operations per second of training, and the MFU.

    MFU = operations of the model per second / (devices · dense peak of the device)
    (arXiv 2204.02311, appendix B)

    It logs `train/tokens_per_sec`, `train/flops_per_sec` and, on a graphics card of known peak,
    `train/mfu`, all of the last `every_n_steps` and of all processes together. The clock runs on
    while batches are loaded and callbacks work, and stands still in validation. It waits for the
    device once for a report, not in each step.

    Operations are counted by PyTorch on the first batch of a fit, forward and backward, and hold
    for each token from then on; a model that has `flops_per_batch`, as for Lightning's callback of
    this name, is not counted. That batch runs without compiled code and with more memory; the clock
    starts after the next one, which compiles. Activations computed again do not count. A plan that
    begins later, as that of `SparseFinishing`, is not counted anew.

    The model is any LightningModule. Lightning's own callback waits for the device in each step,
    counts nothing by itself, and takes for some cards the peak with sparsity, twice the dense one.

    `results` holds the last report, by the names above.

    Args:
        every_n_steps: optimizer steps between reports.
        tokens: gives the tokens of a batch of one process, or whatever else is to be counted.

    Raises:
        ValueError: if `every_n_steps` is below 1.

    Examples:
        >>> from lightning import Trainer
        >>> from lightning_dsmoe.callbacks import ThroughputMonitor
        >>> monitor = ThroughputMonitor(every_n_steps=20)
        >>> trainer = Trainer(callbacks=[monitor], logger=False, accelerator="cpu")
        >>> monitor.results  # until the first report
        {}
    """

    def __init__(
        self, *, every_n_steps: int = 50, tokens: Callable[[Any], int] = batch_tokens
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.tokens = tokens
        self.results: dict[str, float] = {}
        self._counting = StepFlops()
        self._start(0)

    def _start(self, step: int) -> None:
        self._batches = 0  # of this fit
        self._flops_per_token = 0.0
        self._peak: float | None = None
        self._since: float | None = None
        self._reset(step)

    def _reset(self, step: int) -> None:
        self._seconds, self._tokens, self._due = 0.0, 0, step + self.every_n_steps
        self._unreported = 0  # batches, as many in each process

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.results = {}
        self._start(trainer.global_step)
        self._peak = _peak(trainer, pl_module.device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any
    ) -> None:
        if self._batches == 0 and not hasattr(pl_module, "flops_per_batch"):
            self._counting.open()
        if self._batches > 1 and self._since is None:
            self._since = _now(pl_module.device)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._counting.before_backward()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counting.after_backward()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        tokens = self.tokens(batch)
        if self._batches == 0:
            counted = self._counting.close() or getattr(pl_module, "flops_per_batch", 0)
            self._flops_per_token = counted / max(1, tokens)
        self._batches += 1
        if self._since is None:
            self._reset(trainer.global_step)
            return
        self._tokens += tokens
        self._unreported += 1
        if trainer.global_step >= self._due:
            self._report(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read_clock(pl_module)
        self._since = None  # until the next batch of training

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counting.close()  # open still if a callback ended the fit in its first batch
        if self._unreported:
            self._report(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._counting.close()

    def _read_clock(self, pl_module: LightningModule) -> None:
        if self._since is not None:
            now = _now(pl_module.device)
            self._seconds += now - self._since
            self._since = now

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read_clock(pl_module)
        tokens = _over_processes(self._tokens, trainer, pl_module.device)
        flops = tokens * self._flops_per_token / self._seconds
        self.results = {"train/tokens_per_sec": tokens / self._seconds}
        if flops:
            self.results["train/flops_per_sec"] = flops
            if self._peak is not None:
                self.results["train/mfu"] = flops / (trainer.world_size * self._peak)
        log_scalars(trainer, self.results)
        self._reset(trainer.global_step)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from _tensors(tuple(batch.values()))
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        for each in batch:
            yield from _tensors(each)


def _now(device: torch.device) -> float:
    """The time at which a device has done all that it was told to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _over_processes(tokens: int, trainer: Trainer, device: torch.device) -> float:
    total: Any = torch.tensor(tokens, device=device)
    return float(trainer.strategy.reduce(total, reduce_op="sum"))


def _peak(trainer: Trainer, device: torch.device) -> float | None:
    """The dense peak of a device in a trainer's precision; None, and a line, if not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    precision = str(trainer.precision)
    dtype = _DTYPES.get(precision.partition("-")[0])
    peak = None if dtype is None else peak_flops(name, dtype)
    if peak is None:
        rank_zero_info(f"ThroughputMonitor logs no MFU: no peak of {name} in {precision} is known")
    return peak
