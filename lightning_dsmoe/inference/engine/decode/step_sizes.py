"""How many sequences a compiled step is made for.

Each number needs kernels of its own, which take a minute to compile. So steps are made for a few
numbers, and a batch takes the next one: its last sequence stands in the rows that are left over,
where it needs no expert that is not read anyway.
"""

from lightning_dsmoe.routing import AllExperts, SelectionPlan, Threshold, TopK, TopP

# A step is unrolled over its sequences, and the more there are, the fewer experts are needed by
# none: a plan that runs half of the parameters leads its dense twin by a factor of 1.9 with one
# sequence and 1.07 with 16 of random tokens (docs/lab_notes/batched.md).
SIZES = 1, 2, 4, 8, 16
_OF_ONE_TOKEN = AllExperts, TopK, Threshold, TopP


def sizes_for(plan: SelectionPlan, n_sequences: int) -> tuple[int, ...]:
    """The sizes of steps that can decode so many sequences, 16 at most, the smallest first.

    Where a row more may change the others, it is the number itself.

    Examples:
        >>> from lightning_dsmoe.inference.engine.decode.step_sizes import sizes_for
        >>> from lightning_dsmoe.routing import SelectionPlan, ThresholdTopK, TopK
        >>> sizes_for(SelectionPlan(TopK(3)), 5)
        (8, 16)
        >>> sizes_for(SelectionPlan(ThresholdTopK(0.5)), 5)
        (5,)
    """
    if not _chooses_for_each_token_alone(plan):
        return (n_sequences,)
    return tuple(size for size in SIZES if size >= n_sequences)


def group_sizes(plan: SelectionPlan, batch_size: int) -> list[int]:
    """Numbers of sequences in each step that decodes a batch, 16 at most.

    More than 8 that are left by steps of 16 take a step of 8 and another one: with a step of 16 for
    9 sequences a token took 2.1 times as long as with one of 9, with steps of 8 and 1 about as long
    (docs/how-to/serve.md). What is chosen together stays together.

    Examples:
        >>> from lightning_dsmoe.inference.engine.decode.step_sizes import group_sizes
        >>> from lightning_dsmoe.routing import SelectionPlan, ThresholdTopK, TopK
        >>> [group_sizes(SelectionPlan(TopK(3)), n) for n in (35, 12, 8)]
        [[16, 16, 3], [8, 4], [8]]
        >>> group_sizes(SelectionPlan(ThresholdTopK(0.5)), 35)
        [11, 12, 12]
    """
    largest, half = SIZES[-1], SIZES[-2]
    if not _chooses_for_each_token_alone(plan):  # nearly equal, so that at most two are compiled
        n_groups = -(-batch_size // largest)
        return [(batch_size + group) // n_groups for group in range(n_groups)]
    full, rest = divmod(batch_size, largest)
    last = [half, rest - half] if rest > half else [rest] * bool(rest)
    return [largest] * full + last


def _chooses_for_each_token_alone(plan: SelectionPlan) -> bool:
    """False for `ThresholdTopK`, which counts over all tokens of a step, and for what is unknown.

    By exact classes: a subclass may have a `mask` of its own.
    """
    selections = (plan.experts, plan.attention, *plan.layers.values())
    return {type(each) for each in selections}.issubset(_OF_ONE_TOKEN)
