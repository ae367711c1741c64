"""Training steps of the paper's 1B shape and of its dense twin, for `python -m benchmarks.gpu`.

A step is what `fit` does with `precision: bf16-mixed`: the forward pass under autocast, the
language-model and the mutual-information loss, the backward pass, clipping and fused AdamW, on one
random batch. Activations are kept, not computed again.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.record import Measurement, Row, tidy_up
from benchmarks.gpu.sides import Models, Side, compare_sides, made_on, models_1b
from benchmarks.speed.plain_gpt import adamw, training_step
from benchmarks.speed.sparse_models import operations
from benchmarks.timing import seconds_per_call
from lightning_dsmoe import Decoder, RoutingLoss, SelectionPlan
from lightning_dsmoe.training.objective import Step, objective

TWIN, DS_MOE = "dense twin", "DS-MoE"
NOTES = (
    "bf16-mixed, whole training steps, medians of alternating rounds. Speed ratio: to the dense "
    "twin in the same round, above 1 where DS-MoE is faster; low and high are its quartiles. MFU: "
    "three times the operations of a forward pass (two for each weight and token, the head and the "
    "routers included, and causal attention) by the second, over the card's dense bfloat16 peak; "
    "empty for cards whose peak the script does not know. GB as 1e9 bytes."
)
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}
"""Operations a second in bfloat16 without sparsity, by whole names: H100s differ by their board."""
STEPS = 3
MI_WEIGHTS = (6.3e-4, 3.5e-4)


def training(
    device: torch.device,
    until: float,
    *,
    shape: Callable[[], Models] = models_1b,
    context: int = 2048,
    batch_sizes: Sequence[int] = (4, 2, 1),
    rounds: int = 9,
) -> list[Measurement]:
    """Both models, alternating, with compiled blocks and without.

    Args:
        device: where they run.
        until: time by `time.monotonic()` after which no round begins, but for the first.
        shape: makes what is measured.
        context: tokens of a text.
        batch_sizes: batch sizes; the first that fits the memory is taken. Four of the
            1B shape need some 70 GB beside the other model's weights and optimizer.
        rounds: rounds of each comparison.
    """
    models = shape()
    return [
        Measurement(
            {"model": models.name, "blocks": "compiled" if compiled else "eager"},
            partial(
                _compare,
                models,
                device,
                context=context,
                batch_sizes=batch_sizes,
                compiled=compiled,
                rounds=rounds,
                until=until,
            ),
        )
        for compiled in (False, True)  # compiling takes the longest, and may not end in time
    ]


def _compare(
    models: Models,
    device: torch.device,
    *,
    context: int,
    batch_sizes: Sequence[int],
    compiled: bool,
    rounds: int,
    until: float,
) -> list[Row]:
    makers = {TWIN: models.dense, DS_MOE: models.sparse}
    torch.compiler.reset()
    for size in batch_sizes:
        sides = {
            name: _side(made_on(device, make), (size, context), compiled=compiled)
            for name, make in makers.items()
        }
        compared = compare_sides(sides, device, rounds=rounds, until=until)
        sides.clear()
        tidy_up()
        if not any("OutOfMemoryError" in row.get("error", "") for row in compared.values()):
            break
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    rows = []
    for name, row in compared.items():
        found: Row = {"side": name, "sequences": size, "tokens of each": context} | row
        if "ms" in row:
            found["tokens/s"] = 1e3 * size * context / row["ms"]
            per_second = found["tokens/s"] * operations_per_token(makers[name], context)
            found["TFLOP/s"] = per_second / 1e12
            found["MFU"] = per_second / PEAKS[on] if on in PEAKS else None
        rows.append(found)
    return rows


def operations_per_token(make: Callable[[], Decoder], context: int) -> float:
    """Floating-point operations of a training step for each token; the backward pass takes two."""
    decoder = made_on(torch.device("meta"), make)
    plan = SelectionPlan()
    return 3 * operations(decoder, plan, context, predicted=context) / context


def _side(decoder: Decoder, shape: tuple[int, int], *, compiled: bool) -> Side:
    decoder.train().requires_grad_(True)
    if compiled:
        for block in decoder.blocks:
            block.compile()
    optimizer = adamw(decoder)
    device = decoder.embedding.weight.device
    torch.manual_seed(0)
    text_BT = torch.randint(decoder.vocab_size, (shape[0], shape[1] + 1), device=device)
    batch = {"input_ids": text_BT[:, :-1], "labels": text_BT[:, 1:]}
    plan = SelectionPlan()

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return objective(Step.of(decoder, batch, plan), RoutingLoss(*MI_WEIGHTS))[0]

    step = partial(training_step, decoder, optimizer, loss)
    return Side(decoder, partial(seconds_per_call, step, STEPS))
