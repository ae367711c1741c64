"""Training steps of the paper's 1B shape, its dense twin and a sparsely trained one of its size.

A step is what `fit` does with `precision: bf16-mixed`: the forward pass under autocast, the
language-model and the mutual-information loss, the backward pass, clipping and fused AdamW, on one
random batch. Activations are kept, not computed again.

Sparse dispatch is what others train at this size: attention of the twin, and as many experts of
each token as the plan named last runs, by grouped matrix products and with load balancing. It is
compared per token only; the loss that it reaches is another question (`docs/lab_notes/quality.md`).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.gpu.record import Measurement, Row, tidy_up
from benchmarks.gpu.sides import Models, Side, compare_sides, made_on, models_1b
from benchmarks.speed.grouped_experts import GroupedExperts
from benchmarks.speed.plain_gpt import adamw, training_step
from benchmarks.speed.sparse_models import operations
from benchmarks.timing import seconds_per_call
from lightning_dsmoe import Decoder, RoutingLoss, SelectionPlan, TopK
from lightning_dsmoe.peak_flops import peak_flops
from lightning_dsmoe.training.objective import Step, objective

TWIN, DS_MOE, DISPATCH = "dense twin", "DS-MoE", "sparse dispatch"
NOTES = (
    "bf16-mixed, whole training steps, medians of alternating rounds. Speed ratio: to the dense "
    "twin in the same round, above 1 where DS-MoE is faster; low and high are its quartiles. MFU: "
    "three times the operations of a forward pass (two for each weight that runs for a token, the "
    "head and the routers included, and the causal half of attention) by the second, over the "
    "card's dense bfloat16 peak; empty for cards whose peak is not known. MFU, square: with the "
    "whole of attention, as `ThroughputMonitor` and others count it. GB as 1e9 bytes."
)
STEPS = 3
MI_WEIGHTS = (6.3e-4, 3.5e-4)
LOAD_BALANCING = 0.01


def training(
    device: torch.device,
    until: float,
    *,
    shape: Callable[[], Models] = models_1b,
    context: int = 2048,
    batch_sizes: Sequence[int] = (4, 2, 1),
    rounds: int = 9,
) -> list[Measurement]:
    """DS-MoE and the twin, alternating, without compiled blocks and with; then sparse dispatch.

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
                other,
                device,
                context=context,
                batch_sizes=batch_sizes,
                compiled=compiled,
                rounds=rounds,
                until=until,
            ),
        )
        # Compiling takes the longest, and may not end in time. Three models at once would leave
        # less room for the batch.
        for other, compiled in ((DS_MOE, False), (DS_MOE, True), (DISPATCH, True))
    ]


def _compare(
    models: Models,
    other: str,
    device: torch.device,
    *,
    context: int,
    batch_sizes: Sequence[int],
    compiled: bool,
    rounds: int,
    until: float,
) -> list[Row]:
    last = list(models.plans.values())[-1].experts
    sparse = SelectionPlan(experts=last)  # attention is the twin's
    every = {
        TWIN: (models.dense, models.dense, SelectionPlan()),
        DS_MOE: (models.sparse, models.sparse, SelectionPlan()),
        DISPATCH: (partial(_dispatching, models, sparse), models.sparse, sparse),
    }
    makers = {name: every[name] for name in (TWIN, other)}
    for size in batch_sizes:
        torch.compiler.reset()  # or graphs of a second size would be made for any size
        sides = {
            name: _side(made_on(device, make), (size, context), compiled=compiled)
            for name, (make, _, _) in makers.items()
        }
        compared = compare_sides(sides, device, rounds=rounds, until=until)
        sides.clear()
        tidy_up()
        if not any("OutOfMemoryError" in row.get("error", "") for row in compared.values()):
            break
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = peak_flops(on, torch.bfloat16)
    rows = []
    for name, row in compared.items():
        found: Row = {"side": name, "sequences": size, "tokens of each": context} | row
        if "ms" in row:
            found["tokens/s"] = 1e3 * size * context / row["ms"]
            _, counted, plan = makers[name]
            half = operations_per_token(counted, context, plan)
            per_second = found["tokens/s"] * half
            found["TFLOP/s"] = per_second / 1e12
            found["MFU"] = None if peak is None else per_second / peak
            whole = half + attention_per_token(counted, context) * (1 - (context + 1) / context / 2)
            found["MFU, square"] = None if peak is None else found["tokens/s"] * whole / peak
        rows.append(found)
    return rows


def _dispatching(models: Models, plan: SelectionPlan) -> Decoder:
    """The dense twin with the experts of the other model, which runs as many as the plan says."""
    assert isinstance(plan.experts, TopK)
    decoder, mixtures = models.dense(), models.sparse()
    for block, other in zip(decoder.blocks, mixtures.blocks, strict=True):
        block.feed_forward = GroupedExperts(other.feed_forward, plan.experts.k)
    return decoder


def attention_per_token(make: Callable[[], Decoder], context: int) -> float:
    """Operations of a training step in the whole square of attention, for each token."""
    layers = [block.attention for block in made_on(torch.device("meta"), make).blocks]
    return 12 * context * sum(layer.d_head * _heads(layer) for layer in layers)


def _heads(attention: nn.Module) -> int:
    """All heads of queries."""
    return attention.n_heads * getattr(attention, "n_experts", 1)


def operations_per_token(
    make: Callable[[], Decoder], context: int, plan: SelectionPlan | None = None
) -> float:
    """Floating-point operations of a training step for each token; the backward pass takes two."""
    decoder = made_on(torch.device("meta"), make)
    return 3 * operations(decoder, plan or SelectionPlan(), context, predicted=context) / context


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
    layer, plan, losses = decoder.blocks[0].feed_forward, SelectionPlan(), RoutingLoss(*MI_WEIGHTS)
    if isinstance(layer, GroupedExperts):
        plan, losses = SelectionPlan(TopK(layer.k)), RoutingLoss(load_balancing=LOAD_BALANCING)

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return objective(Step.of(decoder, batch, plan), losses)[0]

    step = partial(training_step, decoder, optimizer, loss)
    return Side(decoder, partial(seconds_per_call, step, STEPS))
