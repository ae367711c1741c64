"""An estimate for GPUs, in which all experts on all tokens are preferred."""

import pytest

from lightning_dsmoe.inference.engine.batched.gpu_costs import grouping_pays, kernels

SIZES_6B = 32, 2 * 4096 * 512, 4096


@pytest.mark.parametrize(
    ("n_tokens", "k", "pays"),
    [(1, 1, False), (64, 1, False), (512, 4, False), (2048, 4, True), (4096, 12, False)],
)
def test_a_sixth_of_the_experts_and_many_tokens_pay(n_tokens: int, k: int, pays: bool) -> None:
    n_kernels = kernels(32, in_one_product=True)
    assert grouping_pays(k * n_tokens, n_kernels, n_tokens, *SIZES_6B) == pays


def test_experts_one_by_one_need_more_tokens() -> None:
    fewest = []
    for in_one_product in (True, False):
        n_kernels = kernels(32, in_one_product=in_one_product)
        pays = [n for n in range(64, 20000, 64) if grouping_pays(4 * n, n_kernels, n, *SIZES_6B)]
        assert pays == list(range(pays[0], 20000, 64))
        fewest.append(pays[0])
    assert fewest[0] < fewest[1]
