import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dsmoe.stacked import tokens_of_each_expert, worth_sorting


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tokens=st.integers(0, 8), experts=st.integers(1, 6), share=st.floats(0, 1))
def test_lists_every_active_pair_once_in_order(tokens: int, experts: int, share: float) -> None:
    active = torch.rand(tokens, experts) < share
    running, each = tokens_of_each_expert(active)
    listed = [(int(x), e) for e, at in zip(running, each, strict=True) for x in at]
    by_hand = [(x, e) for e in range(experts) for x in range(tokens) if active[x, e]]
    assert listed == by_hand
    assert all(len(at) for at in each)


@pytest.mark.parametrize(
    ("n_tokens", "n_weights", "device", "worth"),
    [
        (768, 2 * 128 * 32, "cpu", False),
        (768, 2 * 256 * 64, "cpu", True),
        (1, 2 * 128 * 32, "cpu", False),
        (1, 2 * 2048 * 1024, "cpu", True),
        (16_384, 2 * 384 * 64, "cuda", False),
        (16_384, 2 * 2048 * 1024, "cuda", True),
    ],
)
def test_large_experts_run_on_their_own_tokens_alone(
    n_tokens: int, n_weights: int, device: str, worth: bool
) -> None:
    found = worth_sorting(n_tokens, n_weights, torch.device(device), n_kernels=10)
    assert found is worth
    many = worth_sorting(n_tokens, n_weights, torch.device(device), n_kernels=1000)
    assert not many
