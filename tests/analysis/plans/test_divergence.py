"""How far a plan is from all experts."""

import pytest
import torch

from lightning_dsmoe.analysis import HeldOut
from lightning_dsmoe.analysis.plans.divergence import _most_probable, divergence
from lightning_dsmoe.inference import SparseModel
from lightning_dsmoe.routing import SelectionPlan, TopK

PLAN = SelectionPlan(experts=TopK(1), attention=TopK(1))


def naive(model: SparseModel, text: HeldOut, most: int) -> list[float]:
    """The divergence of each window, one token at a time."""
    found = []
    for inputs_BT, labels_BT in text.batches:
        dense, sparse = (
            model(inputs_BT, plan).logits.double().softmax(-1) for plan in (SelectionPlan(), PLAN)
        )
        for window, labels_T in enumerate(labels_BT):
            counted = labels_T != -100
            total = 0.0
            for p_V, q_V in zip(dense[window, counted], sparse[window, counted], strict=True):
                order = p_V.argsort(descending=True)
                first, others = order[:most], order[most:]
                terms = [(p_V[v], q_V[v]) for v in first]
                if len(others):
                    terms.append((p_V[others].sum(), q_V[others].sum()))
                total += sum((p * (p / q).log()).item() for p, q in terms)
            found.append(total)
    return found


@pytest.mark.parametrize("most", [64, 3])
def test_it_is_that_of_a_plain_loop(most: int, model: SparseModel, text: HeldOut) -> None:
    diverge = divergence(model, text, n_probable=most)
    expected = naive(model, text, most)
    assert len(expected) == 12
    assert min(expected) > 0
    torch.testing.assert_close(
        torch.tensor(diverge(PLAN)), torch.tensor(expected), rtol=1e-3, atol=1e-5
    )


def test_all_experts_are_no_way_off(model: SparseModel, text: HeldOut) -> None:
    found = divergence(model, text)(SelectionPlan())
    assert max(map(abs, found)) < 1e-4


def test_rounding_hides_no_improbable_token() -> None:
    logits_BTV = torch.tensor([[[0.0, -30.0, -1.0]]])
    tokens_BTP, log_p_BTP = _most_probable(logits_BTV, 2)
    assert tokens_BTP.tolist() == [[[0, 2]]]
    torch.testing.assert_close(log_p_BTP, logits_BTV.log_softmax(-1)[..., [0, 2, 1]])
