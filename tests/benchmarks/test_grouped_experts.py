import pytest
import torch

from benchmarks.speed.grouped_experts import GroupedExperts
from lightning_dsmoe import MixtureOfExperts, TopK


@pytest.mark.parametrize("k", [1, 3, 4])
def test_it_computes_the_librarys_mixture_under_top_k(k: int) -> None:
    """Outputs and gradients, also where an expert has no token."""
    torch.manual_seed(0)
    layer = GroupedExperts(MixtureOfExperts(16, 4, 8), k)
    with torch.no_grad():
        layer.mixture.router.weight.mul_(20)
    x = torch.randn(2, 5, 16, requires_grad=True)
    found, expected = layer(x), layer.mixture(x, TopK(k))
    torch.testing.assert_close(found.output, expected.output, rtol=2e-6, atol=2e-6)
    wanted = [x, *layer.parameters()]
    target = torch.randn(2, 5, 16)
    gradients = [torch.autograd.grad((o.output * target).sum(), wanted) for o in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_autocast_reaches_the_products() -> None:
    layer = GroupedExperts(MixtureOfExperts(16, 4, 8), 2)
    x = torch.randn(1, 6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x).output
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer(x).output, rtol=0.05, atol=0.05)
