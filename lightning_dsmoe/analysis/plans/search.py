"""Finding the selections of every layer that cost the least loss for a share of the parameters.

The plans are those that `solvers` makes of sensitivities. These are first measured, one router at a
time, and then adjusted by trial: all attention together and each router alone, starting from one
threshold for all layers if thresholds are wanted. Last, uniform plans are tried, which treat all
layers alike.
"""

from collections.abc import Callable, Collection
from functools import cache
from statistics import median
from typing import NamedTuple

from lightning_dsmoe.analysis.evaluation import Found, Gain, Measure
from lightning_dsmoe.analysis.plans import solvers
from lightning_dsmoe.analysis.plans.divergence import Diverge
from lightning_dsmoe.analysis.plans.routing_statistics import Statistics
from lightning_dsmoe.routing import SelectionPlan, Threshold

_FACTORS = (2.0, 0.5)
_MOST_STEPS = 4
_SHARE_BISECTIONS = 7  # shares to a hundredth of the range


class Score(NamedTuple):
    """What a search makes small, of one plan.

    Args:
        value: over the whole text.
        windows: in each window of the text, so that a gain can be told from chance.
    """

    value: float
    windows: tuple[float, ...]

    def clearly_below(self, other: "Score") -> bool:
        """Whether it is lower than another by more than a standard error over windows."""
        return Gain.between(self.windows, other.windows).is_clear


Objective = Callable[[SelectionPlan], Score]
"""Scores a plan: by its loss, or by its divergence from all experts."""


class _Trial(NamedTuple):
    sensitivities: solvers.Sensitivities
    plan: SelectionPlan
    score: Score

    def or_better(self, other: "_Trial") -> "_Trial":
        # A plan found on one text serves others. With the loss and every gain taken, however small,
        # calibrated plans were up to 0.07 % worse than uniform ones on unseen text at 25 % active;
        # with the divergence and clear gains alone they were better (docs/lab_notes/plans.md).
        return other if other.score.clearly_below(self.score) else self


class PlanSearch:
    """Searches for plans of a trained model that lose little and run few parameters.

    Args:
        statistics: gates of a text, from `routing_statistics`.
        measure: evaluates a plan on that text; called once for each plan.
        family: the plans to search among: `THRESHOLDS`, or `FIXED_NUMBERS` of experts.
        make_divergence: called by `within` to get the divergence of plans on that text, which then
            guides the search in place of the loss; not called if sparse plans already have a lower
            loss than all experts.

    Examples:
        >>> from functools import partial
        >>> import torch
        >>> from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts
        >>> from lightning_dsmoe import SelectionPlan, compile_sparse
        >>> from lightning_dsmoe.analysis import HeldOut, PlanSearch, evaluate_plan
        >>> from lightning_dsmoe.analysis.evaluation import measured
        >>> from lightning_dsmoe.analysis.plans.routing_statistics import routing_statistics
        >>> from lightning_dsmoe.analysis.plans.solvers import FIXED_NUMBERS
        >>> decoder = Decoder(
        ...     256,
        ...     16,
        ...     1,
        ...     attention=partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=8),
        ...     feed_forward=partial(MixtureOfExperts, n_experts=8, d_expert=4),
        ... )
        >>> model = compile_sparse(decoder, SelectionPlan())
        >>> tokens = torch.arange(64).view(4, 16)
        >>> text = HeldOut([(tokens, tokens + 1)], n_tokens=64)
        >>> search = PlanSearch(
        ...     routing_statistics(measured(model, text)),
        ...     lambda plan: evaluate_plan(model, plan, text),
        ...     FIXED_NUMBERS,
        ... )
        >>> plan, result = search.within(0.6)
        >>> result.active_share_mean <= 0.6
        True
        >>> plan.experts.k < 8
        True
    """

    def __init__(
        self,
        statistics: Statistics,
        measure: Measure,
        family: solvers.PlanFamily = solvers.THRESHOLDS,
        make_divergence: Callable[[], Diverge] | None = None,
    ) -> None:
        self.statistics = statistics
        self.measure: Measure = cache(measure)
        self.family = family
        self.make_divergence = make_divergence
        self._dense = SelectionPlan()

    def within(self, budget: float) -> Found:
        """Find a plan of a share with as little loss as possible.

        A uniform plan is returned if one is clearly better: one of fixed numbers of experts or, if
        thresholds are searched for, of numbers for attention and a threshold for the feed-forward
        experts.

        Args:
            budget: largest share of the hidden parameters to run, in the mean over tokens, as
                routers choose while all experts run; under thresholds they may choose some more.

        Returns:
            The plan and its result on the text of the search.

        Raises:
            ValueError: if one expert in each layer is more than the budget, or the budget above 1.
        """
        if not self.statistics.least_share <= budget <= 1:
            raise ValueError(
                f"a budget of {budget:g} cannot be met: one expert in each layer is "
                f"{self.statistics.least_share:.4f} of the hidden parameters, all are 1"
            )
        score = self._objective(budget)
        plan = self._or_uniform(self._tuned(budget, score).plan, budget, score)
        return Found(plan, self.measure(plan))

    def sparsest(self, max_increase: float) -> Found:
        """Find a plan of the smallest share whose loss on the text stays below a limit.

        Bisects the share with sensitivities that are measured once, adjusts these at the share that
        is found, and goes on bisecting with them. A uniform plan of the last share is returned as
        in `within`; sparser uniform plans are not looked for.

        Args:
            max_increase: largest increase of the loss over all experts, as a share of it.

        Returns:
            The plan and its result on the text of the search.

        Raises:
            ValueError: if the loss of all experts is not above 0.
        """
        dense_loss = self._loss(self._dense).value
        if dense_loss <= 0:
            raise ValueError(
                "an increase relative to the loss of all experts needs one above 0, this one is "
                f"{dense_loss:g}: give a budget"
            )
        limit = dense_loss * (1 + max_increase)
        middle = (self.statistics.least_share + 1) / 2
        start = solvers.thresholds(self.statistics, solvers.even(self.statistics), middle)
        measured = sensitivities(self.statistics, start, self._loss)
        plan, share = self._bisect(self._dense, 1.0, measured, limit)
        tuned = self._tuned(share, self._loss)
        if tuned.score.value <= self._loss(plan).value:
            plan = tuned.plan
        plan, share = self._bisect(plan, share, tuned.sensitivities, limit)
        plan = self._or_uniform(plan, share, self._loss)
        return Found(plan, self.measure(plan))

    def _loss(self, plan: SelectionPlan) -> Score:
        result = self.measure(plan)
        return Score(result.loss, result.window_losses)

    def _objective(self, budget: float) -> Objective:
        """The divergence, unless there is none or a sparse plan is already better than all experts.

        The divergence varies less from text to text than the loss. But a model that was finished
        under a sparse plan may predict better with fewer experts, and all experts are then the
        wrong model to be close to.
        """
        if self.make_divergence is None:
            return self._loss
        start = self.family.solve(self.statistics, solvers.alike(self.statistics), budget)
        if self._loss(start).clearly_below(self._loss(self._dense)):
            return self._loss
        diverge = self.make_divergence()

        @cache
        def score(plan: SelectionPlan) -> Score:
            windows = diverge(plan)
            return Score(sum(windows), windows)

        return score

    def _tuned(self, budget: float, score: Objective) -> _Trial:
        """Sensitivities of whose neighbors none gives a clearly better plan."""

        def trial(tried: solvers.Sensitivities) -> _Trial:
            plan = self.family.solve(self.statistics, tried, budget)
            return _Trial(tried, plan, score(plan))

        flat = solvers.even(self.statistics)
        start = solvers.thresholds(self.statistics, flat, budget)
        measured = sensitivities(self.statistics, start, score)
        best = trial(solvers.alike(self.statistics))
        for other in (flat, measured, {name: s**0.5 for name, s in measured.items()}):
            best = best.or_better(trial(other))
        for group in [self.statistics.of_kind("attention").layers, *([n] for n in flat)]:
            best = _climb(best, group, trial)
        return best

    def _bisect(
        self, plan: SelectionPlan, share: float, tried: solvers.Sensitivities, limit: float
    ) -> tuple[SelectionPlan, float]:
        """The sparsest plan found below a share whose loss is within a limit, and its share."""
        least = self.statistics.least_share
        for _ in range(_SHARE_BISECTIONS):
            middle = (least + share) / 2
            candidate = self.family.solve(self.statistics, tried, middle)
            if self._loss(candidate).value <= limit:
                plan, share = candidate, middle
            else:
                least = middle
        return plan, share

    def _or_uniform(self, plan: SelectionPlan, budget: float, score: Objective) -> SelectionPlan:
        """The plan, or a uniform one of the budget if that is clearly better."""
        for rival in self.family.uniform(self.statistics, budget):
            if score(rival).clearly_below(score(plan)):
                plan = rival
        return plan


def sensitivities(
    statistics: Statistics, plan: SelectionPlan, score: Objective
) -> solvers.Sensitivities:
    """Score per probability that a router drops, measured with only that router under the plan.

    A router that drops nothing counts as typical (the median), and none as less than a twentieth of
    that: a gain by chance must not close a router.
    """
    base = score(SelectionPlan()).value
    found: dict[str, float | None] = {}
    selections = plan.selections(statistics.layers)
    for name, router in statistics.layers.items():
        selection = selections[name]
        mass = router.dropped_mass(selection.eps).item() if isinstance(selection, Threshold) else 0
        alone = SelectionPlan(layers={name: selection})
        found[name] = max(0.0, score(alone).value - base) / mass if mass else None
    typical = median([s for s in found.values() if s] or [1.0])
    return {n: typical if s is None else max(s, typical / 20) for n, s in found.items()}


def _climb(
    start: _Trial, group: Collection[str], trial: Callable[[solvers.Sensitivities], _Trial]
) -> _Trial:
    """Make some routers more sensitive, or else less, as long as that clearly helps."""
    best = start
    for factor in _FACTORS:
        for _ in range(_MOST_STEPS):
            tried = trial(
                {n: s * factor if n in group else s for n, s in best.sensitivities.items()}
            )
            if best.or_better(tried) is best:
                break
            best = tried
        if best is not start:
            break
    return best
