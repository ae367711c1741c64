from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lightning_dsmoe.analysis import HeldOut, PlanResult, evaluate_plan
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference import SparseModel
from lightning_dsmoe.metrics import ParameterCounts, active_masks, active_parameters
from lightning_dsmoe.routing import SelectionPlan, Threshold, TopK


def test_loss_and_share_are_those_of_the_decoder(
    decoder: Decoder, model: SparseModel, counts: ParameterCounts, text: HeldOut
) -> None:
    plan = SelectionPlan.of_blocks((TopK(2), Threshold(0.9)), (TopK(1), Threshold(0.8)))
    found = evaluate_plan(model, plan, text, counts)
    losses, shares = [], []
    for inputs, labels in text.batches:
        with torch.no_grad():
            logits, routings = decoder(inputs, plan)
        counted = labels != -100
        losses.append(F.cross_entropy(logits[counted], labels[counted], reduction="none"))
        share = active_parameters(counts, active_masks(routings, plan), counted)
        shares.append(share.mean * counted.sum())
    assert found.loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert found.active_share_mean == pytest.approx((sum(shares) / text.n_tokens).item(), rel=1e-5)
    assert found.active_share_p50 <= found.active_share_p95
    assert found.tokens_per_second > 0


def test_names_of_version_0_1() -> None:
    result: Any = PlanResult(2.0, 0.3, 0.2, 0.4, 1.0, ())
    for old, value in (("share", 0.3), ("share_p50", 0.2), ("share_p95", 0.4)):
        with pytest.warns(DeprecationWarning, match=f"PlanResult.{old} is now active_share_"):
            assert getattr(result, old) == value


def test_halves_of_a_single_batch_share_its_windows() -> None:
    inputs_BT, labels_BT = torch.randint(29, (2, 3, 4))
    first, second = HeldOut([(inputs_BT, labels_BT)], 12).halves()
    assert torch.equal(first.batches[0][0], inputs_BT[:2])
    assert torch.equal(second.batches[0][1], labels_BT[2:])
    assert (first.n_tokens, second.n_tokens) == (8, 4)
    with pytest.raises(ValueError, match=r"4 tokens in one window, .* more than 4 are needed"):
        second.halves()


def test_smaller_batches_hold_the_same_windows(text: HeldOut) -> None:
    for n_tokens, rows in ((1, 1), (16, 1), (33, 2), (1000, 2)):
        found = text.in_batches_of(n_tokens)
        assert {len(inputs_BT) for inputs_BT, _ in found.batches} == {rows}
        assert found.n_tokens == text.n_tokens
        for part, whole in zip(
            zip(*found.batches, strict=True), zip(*text.batches, strict=True), strict=True
        ):
            assert torch.equal(torch.cat(part), torch.cat(whole))


def test_the_length_of_windows_is_part_of_the_fingerprint() -> None:
    tokens = torch.arange(128)
    prints = {
        HeldOut([(x, x)], 128).fingerprint() for x in (tokens.view(4, 32), tokens.view(2, 64))
    }
    assert len(prints) == 2


def test_a_model_that_has_gone_wrong(
    model: SparseModel, counts: ParameterCounts, text: HeldOut
) -> None:
    with torch.no_grad():
        model.decoder.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        evaluate_plan(model, SelectionPlan(), text, counts)


def test_halves_share_the_text(text: HeldOut) -> None:
    first, second = text.halves()
    assert first.batches + second.batches == text.batches
    assert first.n_tokens + second.n_tokens == text.n_tokens
    assert second.n_tokens == 3 * 2 * 16 - 11
    assert len({each.fingerprint() for each in (text, first, second)}) == 3
