"""Any model under a plan against the same model with all experts: what a certificate measures."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_dsmoe.analysis.certificate.losses import gap_interval
from lightning_dsmoe.analysis.certificate.mixtures import ErrorTotals, MixtureErrors, token_errors
from lightning_dsmoe.analysis.evaluation import evaluate
from lightning_dsmoe.analysis.measured import MeasuredBatches, SampleLoss
from lightning_dsmoe.routing import SelectionPlan


class Comparison(NamedTuple):
    """A model under a plan against all its experts, on the same samples.

    The names of the fields are those of a certificate.

    Args:
        samples: number of samples.
        dense_loss: mean loss with all experts.
        sparse_loss: mean loss under the plan.
        relative_gap: sparse_loss / dense_loss - 1.
        relative_gap_95: its 95 % bootstrap interval over samples; None for a single sample.
        active_share_mean: share of the hidden parameters that run for a token.
        active_share_p50: its median over tokens.
        active_share_p95: its 95th percentile.
        layers: what the plan changes in each routed layer that is called, by name.
    """

    samples: int
    dense_loss: float
    sparse_loss: float
    relative_gap: float
    relative_gap_95: tuple[float, float] | None
    active_share_mean: float
    active_share_p50: float
    active_share_p95: float
    layers: Mapping[str, MixtureErrors]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for `SparseModule.save(path, certificate=…)`."""
        layers = {name: errors._asdict() for name, errors in self.layers.items()}
        return {**self._asdict(), "layers": layers}


def compare_with_dense(
    model: nn.Module,
    plan: SelectionPlan,
    batches: Iterable[Any],
    loss: SampleLoss,
    **options: Any,
) -> Comparison:
    """Measure what a plan costs any model, as `judge` does of a language model.

    Args:
        model: any model with routed layers.
        plan: the experts that run.
        batches: such as a `DataLoader`.
        loss: gives the loss of every sample of a batch, `[B]`, called as `loss(model, batch)`.
        options: `mask` and `outside` of `MeasuredBatches`.

    Returns:
        Both losses and their gap, active share, and what the plan changes in each layer.

    Raises:
        FloatingPointError: if a loss is not a finite number.
        ValueError: as `evaluate_plan` does, and if the loss with all experts is not above 0, so
            that there is no relative gap.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_dsmoe import MixtureOfExperts, OutputOnly, SelectionPlan, TopK
        >>> from lightning_dsmoe.analysis.certificate import compare_with_dense
        >>> model = nn.Sequential(nn.Linear(4, 8), OutputOnly(MixtureOfExperts(8, 4, 16)))
        >>> def loss(model, batch):
        ...     x, label = batch
        ...     return nn.functional.cross_entropy(model(x), label, reduction="none")
        >>> batches = [(torch.randn(6, 4), torch.randint(8, (6,))) for _ in range(3)]
        >>> found = compare_with_dense(model, SelectionPlan(experts=TopK(2)), batches, loss)
        >>> found.samples, found.layers["1.layer"].error_mean > 0
        (18, True)
    """
    on = MeasuredBatches(model, batches, loss, **options)
    dense, sparse = evaluate(on, SelectionPlan()), evaluate(on, plan)
    if dense.loss <= 0:
        raise ValueError(
            f"a relative gap needs a loss above 0 with all experts, this one is {dense.loss:g}"
        )
    totals: dict[str, ErrorTotals] = defaultdict(ErrorTotals)
    for batch in on.batches:
        mask = None if on.mask is None else on.mask(batch)
        for name, errors in token_errors(model, plan, partial(loss, model, batch)).items():
            totals[name].add(errors, mask)
    losses = (torch.tensor(each.window_losses) for each in (dense, sparse))
    return Comparison(
        samples=len(dense.window_losses),
        dense_loss=dense.loss,
        sparse_loss=sparse.loss,
        relative_gap=sparse.loss / dense.loss - 1,
        relative_gap_95=gap_interval(*losses),
        active_share_mean=sparse.active_share_mean,
        active_share_p50=sparse.active_share_p50,
        active_share_p95=sparse.active_share_p95,
        layers={name: total.compute() for name, total in totals.items()},
    )
