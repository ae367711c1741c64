import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import Tensor

from lightning_dsmoe.metrics import ExpertUtilization, expert_utilization

E = 4


def random_probs(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator)).softmax(-1)


def loads() -> dict[str, Tensor]:
    dead = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    return {
        "uniform": torch.full((6, E), 1 / E),
        "one-hot": torch.eye(E).repeat(3, 1),
        "skewed": torch.tensor([[0.7, 0.1, 0.1, 0.1]]).repeat(5, 1),
        "dead": dead.repeat(4, 1),
    }


@pytest.mark.parametrize(
    ("name", "effective", "conditional", "dead"),
    [
        ("uniform", 4.0, math.log(4), []),
        ("one-hot", 4.0, 0.0, []),
        ("skewed", math.exp(-0.7 * math.log(0.7) - 0.3 * math.log(0.1)), None, []),
        ("dead", 2.0, math.log(2), [2, 3]),
    ],
)
def test_known_loads(
    name: str, effective: float, conditional: float | None, dead: list[int]
) -> None:
    used = expert_utilization(loads()[name])
    torch.testing.assert_close(used.effective, torch.tensor(effective))
    torch.testing.assert_close(used.entropy, torch.tensor(math.log(effective)))
    expected = math.log(effective) if conditional is None else conditional
    torch.testing.assert_close(used.conditional_entropy, torch.tensor(expected))
    assert used.dead_experts == dead


@pytest.mark.parametrize("probs", [torch.zeros(3, E), torch.zeros(0, E)], ids=["zeros", "empty"])
def test_no_gate_or_no_token_is_zero_use(probs: Tensor) -> None:
    used = expert_utilization(probs)
    assert used.effective == used.entropy == used.conditional_entropy == 0
    assert used.share.tolist() == [0.0] * E
    assert used.dead_experts == list(range(E))


def test_same_as_a_loop_over_tokens() -> None:
    probs = random_probs(3, 5, E)
    mask = torch.rand(3, 5) < 0.6
    rows = [row for row, counts in zip(probs.view(-1, E), mask.flatten(), strict=True) if counts]
    share = [sum(row[e].item() for row in rows) / len(rows) for e in range(E)]
    marginal = -sum(p * math.log(p) for p in share)
    conditional = -sum(p * math.log(p) for row in rows for p in row.tolist()) / len(rows)

    used = expert_utilization(probs, mask)

    assert used.share.tolist() == pytest.approx(share, rel=1e-5)
    assert used.entropy.item() == pytest.approx(marginal, rel=1e-5)
    assert used.effective.item() == pytest.approx(math.exp(marginal), rel=1e-5)
    assert used.conditional_entropy.item() == pytest.approx(conditional, rel=1e-5)


@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_batches_add_up_to_the_whole(sizes: list[int], seed: int) -> None:
    probs = random_probs(sum(sizes), E, seed=seed)
    metric = ExpertUtilization(E)
    for part in probs.split(sizes):
        metric.update(part)
    torch.testing.assert_close(metric.compute(), expert_utilization(probs), rtol=1e-4, atol=1e-6)


def test_merged_halves_are_the_whole() -> None:
    probs = random_probs(20, E)
    first, second = ExpertUtilization(E), ExpertUtilization(E)
    first.update(probs[:7])
    second.update(probs[7:])
    first.merge_state(second)
    torch.testing.assert_close(first.compute(), expert_utilization(probs))


def test_reset_forgets() -> None:
    metric = ExpertUtilization(E)
    metric.update(loads()["dead"])
    metric.reset()
    metric.update(loads()["uniform"])
    assert metric.compute().dead_experts == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_type(dtype: torch.dtype) -> None:
    probs = random_probs(9, E)
    metric = ExpertUtilization(E)
    metric.update(probs.to(dtype))
    torch.testing.assert_close(
        metric.compute().share, expert_utilization(probs).share, rtol=0.02, atol=1e-3
    )


def test_confident_and_balanced_routing_differs_from_uncertain_routing() -> None:
    """Both use all experts; only the conditional entropy tells them apart."""
    confident, uncertain = (expert_utilization(loads()[name]) for name in ("one-hot", "uniform"))
    torch.testing.assert_close(confident.effective, uncertain.effective)
    assert confident.conditional_entropy < 1e-6 < uncertain.conditional_entropy


def test_dead_share_is_a_fraction_of_the_even_share() -> None:
    probs = torch.tensor([[0.5, 0.4, 0.08, 0.02]])
    dead = [expert_utilization(probs, dead_share=s).dead_experts for s in (0.0, 0.07, 0.1, 0.4)]
    assert dead == [[], [], [3], [2, 3]]


@pytest.mark.parametrize(("n_experts", "dead_share"), [(0, 0.01), (4, 1.0), (4, -0.1)])
def test_impossible_arguments(n_experts: int, dead_share: float) -> None:
    with pytest.raises(ValueError, match=f"{n_experts} and {dead_share}"):
        ExpertUtilization(n_experts, dead_share=dead_share)


def test_plot() -> None:
    metric = ExpertUtilization(E)
    metric.update(loads()["skewed"])
    figure, axes = metric.plot()
    assert isinstance(figure, Figure)
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.7, 0.1, 0.1, 0.1])
    assert metric.plot(ax=axes) == (figure, axes)
