import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dsmoe.stacked import tokens_of_each_expert


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tokens=st.integers(0, 8), experts=st.integers(1, 6), share=st.floats(0, 1))
def test_lists_every_active_pair_once_in_order(tokens: int, experts: int, share: float) -> None:
    active = torch.rand(tokens, experts) < share
    running, each = tokens_of_each_expert(active)
    listed = [(int(x), e) for e, at in zip(running, each, strict=True) for x in at]
    by_hand = [(x, e) for e in range(experts) for x in range(tokens) if active[x, e]]
    assert listed == by_hand
    assert all(len(at) for at in each)
