from collections.abc import Callable
from functools import partial

import pytest
import torch

from lightning_dsmoe.routing import CosineRouter, LinearRouter, MLPRouter, Router

ROUTERS: list[Callable[[int, int], Router]] = [
    LinearRouter,
    partial(MLPRouter, d_hidden=6),
    partial(CosineRouter, d_hidden=6),
]
IDS = ["linear", "mlp", "cosine"]


@pytest.fixture(params=ROUTERS, ids=IDS)
def router(request: pytest.FixtureRequest) -> Router:
    made = request.param(8, 5)
    assert isinstance(made, Router)
    return made


def test_probabilities_are_the_softmax_of_the_logits(router: Router) -> None:
    logits, probs = router(torch.randn(2, 3, 8))
    assert logits.shape == probs.shape == (2, 3, 5)
    torch.testing.assert_close(probs, logits.exp() / logits.exp().sum(-1, keepdim=True))


def test_each_token_is_scored_by_itself(router: Router) -> None:
    x = torch.randn(4, 8)
    torch.testing.assert_close(router(x).logits[2], router(x[2]).logits)


def test_every_parameter_gets_a_gradient(router: Router) -> None:
    router(torch.randn(16, 8)).logits.square().sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_in_float32_under_autocast(router: Router, dtype: torch.dtype) -> None:
    x = torch.randn(4, 8).to(dtype)
    expected = router(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x)
    assert torch.equal(routing.logits, expected.logits)
    assert torch.equal(routing.probs, expected.probs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_in_float32_with_half_precision_weights(router: Router, dtype: torch.dtype) -> None:
    x = torch.randn(4, 8)
    routing = router.to(dtype)(x.to(dtype))
    assert torch.equal(routing.logits, router.float()(x.to(dtype).float()).logits)


def test_double_precision_gradients_agree_with_finite_differences(router: Router) -> None:
    router.double()
    weights = list(router.parameters())
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert router(x).probs.dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x, *_: router(x).probs, (x, *weights), atol=1e-6)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_tokens_give_finite_probabilities_and_gradients(
    router: Router, size: float
) -> None:
    x = (size * torch.randn(4, 8)).requires_grad_()
    probs = router(x).probs
    probs[:, 0].sum().backward()
    assert probs.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("make", ROUTERS[:2], ids=IDS[:2])
def test_zero_init_std_starts_with_equal_gates(make: Callable[..., Router]) -> None:
    probs = make(8, 5, init_std=0.0)(torch.randn(3, 8)).probs
    assert torch.equal(probs, torch.full((3, 5), 0.2))


def test_cosine_temperature_has_a_ceiling() -> None:
    router = CosineRouter(8, 5, d_hidden=6, init_scale=1e6)
    assert router(torch.randn(50, 8)).logits.abs().max() <= 100 + 1e-3


def test_cosine_sees_directions_alone() -> None:
    router = CosineRouter(8, 5, d_hidden=6, init_scale=3.0)
    x = torch.randn(4, 8)
    torch.testing.assert_close(router(7 * x).logits, router(x).logits)


@pytest.mark.parametrize("make", [LinearRouter, MLPRouter, CosineRouter])
@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (4, -1)])
def test_sizes_below_one_are_refused(
    make: Callable[[int, int], Router], sizes: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match=f"got {sizes[0]} and {sizes[1]}"):
        make(*sizes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(MLPRouter, d_hidden=0), "d_hidden must be at least 1, got 0"),
        (partial(CosineRouter, d_hidden=0), "got 0, 1.0"),
        (partial(CosineRouter, init_scale=-2.0), "got 512, -2.0"),
    ],
)
def test_options_out_of_range_are_refused(make: Callable[[int, int], Router], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(8, 5)
