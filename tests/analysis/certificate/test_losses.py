import pytest
import torch
from torch.nn import functional as F

from lightning_dsmoe.analysis.certificate.losses import compare_windows, gap_interval


@pytest.mark.parametrize("at_once", [7, 60, 2**22])
def test_sums_of_windows(at_once: int) -> None:
    dense, sparse = torch.randn(2, 3, 5, 7)
    sparse = dense + 0.5 * sparse
    labels = torch.randint(7, (3, 5))
    labels[1, 2:] = -100
    labels[2] = -100
    sums = compare_windows(dense, sparse, labels, max_elements=at_once)
    p, q = dense.double().log_softmax(-1), sparse.double().log_softmax(-1)
    for window in range(3):
        counted = labels[window] != -100
        expected = [0.0] * 4
        for t in counted.nonzero().flatten().tolist():
            expected[0] += F.cross_entropy(dense[window, t], labels[window, t]).item()
            expected[1] += F.cross_entropy(sparse[window, t], labels[window, t]).item()
            expected[2] += torch.distributions.kl_divergence(
                torch.distributions.Categorical(logits=p[window, t]),
                torch.distributions.Categorical(logits=q[window, t]),
            ).item()
            expected[3] += float(dense[window, t].argmax() == sparse[window, t].argmax())
        found = [each[window].item() for each in sums]
        assert found == pytest.approx([*expected, counted.sum().item()], rel=1e-6)
    assert 0 < sums.agreed.sum() < sums.tokens.sum()


@pytest.mark.parametrize("at_once", [30, 2**22])
def test_the_interval_is_that_of_a_loop(at_once: int) -> None:
    dense = torch.rand(13, dtype=torch.float64) + 1
    sparse = dense * (1 + 0.05 * torch.randn(13, dtype=torch.float64))
    generator = torch.Generator().manual_seed(1234)
    gaps = []
    for _ in range(200):
        drawn = torch.randint(13, (13,), generator=generator).tolist()
        lost = sum(sparse[n].item() for n in drawn)
        gaps.append(lost / sum(dense[n].item() for n in drawn) - 1)
    gaps.sort()

    def percentile(p: float) -> float:
        low, rest = divmod(p * (len(gaps) - 1), 1)
        return gaps[int(low)] * (1 - rest) + gaps[int(low) + 1] * rest

    found = gap_interval(dense, sparse, resamples=200, max_elements=at_once)
    assert found == pytest.approx((percentile(0.025), percentile(0.975)), rel=1e-9)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    inside = 0
    for _ in range(200):
        dense = torch.rand(40, dtype=torch.float64) + 1
        sparse = dense * (1.02 + 0.05 * torch.randn(40, dtype=torch.float64))
        low, high = gap_interval(dense, sparse, resamples=300) or (0.0, 0.0)
        inside += low <= 0.02 <= high
    assert 0.87 < inside / 200 <= 0.99


def test_equal_losses_and_single_windows() -> None:
    losses = torch.rand(5) + 1
    assert gap_interval(losses, losses) == (0, 0)
    assert gap_interval(losses[:1], losses[:1]) is None
    assert gap_interval(losses[:0], losses[:0]) is None
