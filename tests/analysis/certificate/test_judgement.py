from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lightning_dsmoe.analysis import HeldOut
from lightning_dsmoe.analysis.certificate.check import ROUNDING
from lightning_dsmoe.analysis.certificate.judgement import judge
from lightning_dsmoe.analysis.certificate.mixtures import token_errors
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference import compile_sparse
from lightning_dsmoe.metrics import active_masks, active_parameters, count_parameters
from lightning_dsmoe.routing import SelectionPlan, Threshold, TopK
from lightning_dsmoe.routing.routing import block_layer_name

PLAN = SelectionPlan.of_blocks((TopK(2), Threshold(0.9)), (TopK(1), Threshold(0.8)))


def test_what_a_judgement_says(decoder: Decoder, text: HeldOut) -> None:
    found = judge(compile_sparse(decoder, PLAN), text, decoder)
    inputs, labels = (torch.cat(parts) for parts in zip(*text.batches, strict=True))
    counted = labels != -100
    with torch.no_grad():
        dense = decoder(inputs).logits
        sparse, routings = decoder(inputs, PLAN)
    losses = [F.cross_entropy(x[counted], labels[counted]).item() for x in (dense, sparse)]
    assert found.tokens == text.n_tokens
    assert found.windows == 12
    assert found.dense == "checkpoint"
    assert [found.dense_loss, found.sparse_loss] == pytest.approx(losses, rel=1e-5)
    assert found.relative_gap == pytest.approx(losses[1] / losses[0] - 1, rel=1e-4)
    assert found.relative_gap_95 is not None
    low, high = found.relative_gap_95
    assert low < found.relative_gap < high
    p, q = (x[counted].log_softmax(-1) for x in (dense, sparse))
    kl = F.kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert found.kl == pytest.approx(kl, rel=1e-4)
    agreed = (dense.argmax(-1) == sparse.argmax(-1))[counted].double().mean().item()
    assert 0.1 < agreed < 1
    assert found.top_1_agreement == pytest.approx(agreed)
    share = active_parameters(count_parameters(decoder), active_masks(routings, PLAN), counted)
    shares = [found.active_share_mean, found.active_share_p50, found.active_share_p95]
    assert shares == pytest.approx([each.item() for each in share])
    assert found.all_experts_error is not None
    assert found.all_experts_error <= ROUNDING
    assert found.loss_before_quantization is None
    assert found.routing_agreement is None
    layers = token_errors(decoder, PLAN, lambda: decoder(inputs))
    assert len(layers) == 4
    for kind in ("experts", "attention"):
        for block, errors in enumerate(getattr(found, kind)):
            rows = (x[counted.flatten()] for x in layers[block_layer_name(block, kind)])
            numbers = [n for x in rows for n in (x.mean(), x.max())]
            assert list(errors) == pytest.approx([n.item() for n in numbers], rel=1e-3)


def test_the_artifact_can_stand_for_the_trained_model(decoder: Decoder, text: HeldOut) -> None:
    model = compile_sparse(decoder, PLAN)
    found, expected = judge(model, text), judge(model, text, decoder)
    assert found.dense == "artifact"
    assert found.all_experts_error is None
    assert found.dense_loss == pytest.approx(expected.dense_loss, rel=1e-6)
    assert found.kl == pytest.approx(expected.kl, rel=1e-4)


def test_the_dense_plan_changes_nothing(decoder: Decoder, text: HeldOut) -> None:
    found = judge(compile_sparse(decoder, SelectionPlan()), text, decoder)
    assert abs(found.relative_gap) < 1e-6
    assert 0 <= found.kl < 1e-9
    assert found.top_1_agreement == found.active_share_mean == 1
    assert all(not any(errors) for errors in found.experts + found.attention if errors)


def test_eight_bits(decoder: Decoder, text: HeldOut) -> None:
    model = compile_sparse(decoder, PLAN, quantization="int8")
    found = judge(model, text, decoder)
    exact = judge(compile_sparse(decoder, PLAN), text, decoder)
    everyone = SelectionPlan()
    with torch.no_grad():
        off = max(
            (model.logits(inputs, plan=everyone) - decoder(inputs).logits).abs().max().item()
            for inputs, _ in text.batches
        )
        largest = max(decoder(inputs).logits.abs().max().item() for inputs, _ in text.batches)
    assert found.all_experts_error == pytest.approx(off / largest)
    assert 1e-4 < off / largest < 0.5
    assert found.dense_loss == exact.dense_loss
    assert found.loss_before_quantization == pytest.approx(exact.sparse_loss, rel=1e-6)
    assert found.sparse_loss != exact.sparse_loss
    assert found.routing_agreement is not None
    assert 0.9 < found.routing_agreement <= 1
    alone = judge(model, text)
    assert alone.loss_before_quantization is None
    assert alone.routing_agreement is None
    assert alone.dense_loss != found.dense_loss


def test_it_leaves_the_decoder_as_it_is(decoder: Decoder, text: HeldOut) -> None:
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    for training in (True, False):
        decoder.train(training)
        judge(compile_sparse(decoder, PLAN), text, decoder)
        assert decoder.training == training
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("with_decoder", [False, True])
def test_what_cannot_be_judged(with_decoder: bool, decoder: Decoder, text: HeldOut) -> None:
    options: dict[str, Any] = {"decoder": decoder} if with_decoder else {}
    model = compile_sparse(decoder, PLAN)
    padding = HeldOut([(x, torch.full_like(x, -100)) for x, _ in text.batches], 0)
    with pytest.raises(ValueError, match="no token to predict"):
        judge(model, padding, **options)
    with torch.no_grad():
        decoder.norm.weight.fill_(float("nan"))
        model.decoder.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan, of the sparse model nan"):
        judge(model, text, **options)


def test_one_window_has_no_interval(decoder: Decoder, text: HeldOut) -> None:
    inputs, labels = text.batches[0]
    one = HeldOut([(inputs[:1], labels[:1])], 16)
    assert judge(compile_sparse(decoder, PLAN), one).relative_gap_95 is None
