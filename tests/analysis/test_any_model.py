"""Plans of a model that is no decoder, measured by a loss of one's own."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dsmoe.analysis import (
    HeldOut,
    MeasuredBatches,
    MeasuredText,
    PlanSearch,
    calibrate,
    evaluate_plan,
    sweep,
    sweep_plans,
)
from lightning_dsmoe.analysis.certificate import compare_with_dense
from lightning_dsmoe.analysis.certificate.judgement import judge
from lightning_dsmoe.analysis.certificate.mixtures import TokenErrors, token_errors
from lightning_dsmoe.analysis.evaluation import evaluate
from lightning_dsmoe.analysis.plans.routing_statistics import routing_statistics
from lightning_dsmoe.analysis.plans.solvers import FIXED_NUMBERS
from lightning_dsmoe.attention import KVCache, MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.inference import SparseModel, compile_sparse
from lightning_dsmoe.losses.cross_entropy import window_cross_entropy
from lightning_dsmoe.metrics import ParameterCounts, active_parameters, count_parameters
from lightning_dsmoe.routing import (
    LinearRouter,
    OutputOnly,
    SelectionPlan,
    Threshold,
    TopK,
    routed_layers,
    run_plan,
)
from lightning_dsmoe.routing.routing import block_layer_name

Batch = tuple[Tensor, Tensor, Tensor]
ROUTER = partial(LinearRouter, init_std=0.4)
PLAN = SelectionPlan(experts=TopK(2), attention=Threshold(0.9), layers={"last.layer": TopK(1)})


class Encoder(nn.Module):
    """A classifier of padded sequences, whose blocks are not alike."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.attention = MixtureOfAttentionHeads(8, 3, 2, 4, router=ROUTER, bias=True)
        self.drop = nn.Dropout(0.5)
        self.first = MixtureOfExperts(8, 5, 6, router=ROUTER, d_shared=3)
        self.last = OutputOnly(MixtureOfExperts(8, 4, 2, router=ROUTER))
        self.classifier = nn.Linear(8, 7)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.stem(x)
        x = x + self.drop(self.attention(x, mask=mask).output)
        x = x + self.first(x).output
        x = x + self.last(x)
        y: Tensor = self.classifier(x[:, -1])
        return y


def classify(model: nn.Module, batch: Batch) -> Tensor:
    x, mask, labels = batch
    return F.cross_entropy(model(x, mask), labels, reduction="none")


@pytest.fixture
def encoder() -> Encoder:
    made = Encoder()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


@pytest.fixture
def batches() -> list[Batch]:
    """Padded on the left."""
    padding = torch.tensor([0, 2, 1])[:, None]
    mask = torch.arange(6) >= padding
    return [(torch.randn(3, 6, 4), mask, torch.randint(7, (3,))) for _ in range(4)]


def test_loss_and_share_are_those_of_a_plain_loop(encoder: Encoder, batches: list[Batch]) -> None:
    found = evaluate_plan(
        encoder,
        PLAN,
        batches,
        loss=classify,
        mask=lambda batch: batch[1],
        outside=["classifier"],
    )
    counts = count_parameters(encoder, outside=["classifier"])
    losses, running = [], []
    encoder.eval()
    for x, mask, labels in batches:
        with torch.no_grad(), run_plan(encoder, PLAN):
            for sample, valid, label in zip(x, mask, labels, strict=True):
                losses.append(F.cross_entropy(encoder(sample[None], valid[None])[0], label).item())
            tokens = encoder.stem(x)
            first = tokens + encoder.attention(tokens, mask=mask).output
            second = first + encoder.first(first).output
        masks = (
            Threshold(0.9).mask(encoder.attention.router(tokens).probs),
            TopK(2).mask(encoder.first.router(first).probs),
            TopK(1).mask(encoder.last.layer.router(second).probs),
        )
        running.append({n: m[mask] for n, m in zip(counts.layers, masks, strict=True)})
    assert found.window_losses == pytest.approx(losses, rel=1e-5)
    assert found.loss == pytest.approx(sum(losses) / 12, rel=1e-5)
    joined = {name: torch.cat([each[name] for each in running]) for name in counts.layers}
    share = active_parameters(counts, joined)
    assert 0.2 < share.mean < 0.9
    shares = (found.active_share_mean, found.active_share_p50, found.active_share_p95)
    assert shares == pytest.approx([each.item() for each in share])


def test_statistics_are_of_tokens_that_count(encoder: Encoder, batches: list[Batch]) -> None:
    every = routing_statistics(MeasuredBatches(encoder, batches, classify))
    some = routing_statistics(MeasuredBatches(encoder, batches, classify, mask=lambda b: b[1]))
    assert list(every.layers) == ["first", "last.layer", "attention"]
    assert {len(router.probs_NE) for router in every.layers.values()} == {4 * 18}
    assert {len(router.probs_NE) for router in some.layers.values()} == {4 * 15}


def test_a_sweep_is_its_plans_one_by_one(encoder: Encoder, batches: list[Batch]) -> None:
    found = sweep(encoder, batches, classify)
    assert list(found) == list(sweep_plans(encoder))
    assert found["all"].active_share_mean == 1
    for name in ("all", "top 1 and 1", "threshold 0.75"):
        again = evaluate_plan(encoder, sweep_plans(encoder)[name], batches, loss=classify)
        assert found[name] == again._replace(tokens_per_second=found[name].tokens_per_second)


def test_all_plans_see_the_same_samples_of_a_shuffled_loader() -> None:
    data = TensorDataset(torch.randn(12, 6, 4), torch.randint(7, (12,)))
    loader = DataLoader(data, batch_size=5, shuffle=True)
    seen: list[Tensor] = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(batch[0])
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    results = sweep(Encoder(), loader, loss)
    assert {len(result.window_losses) for result in results.values()} == {12}
    assert len(seen) == 3 * len(results)
    assert all(torch.equal(x, seen[number % 3]) for number, x in enumerate(seen))


@pytest.mark.parametrize("fixed", [False, True])
def test_calibration_is_judged_on_what_it_was_not_found_on(
    fixed: bool, encoder: Encoder, batches: list[Batch]
) -> None:
    done: list[str] = []
    found = calibrate(encoder, batches, classify, budget=0.7, fixed=fixed, on_progress=done.append)
    layers = routed_layers(encoder)
    assert set(found.plan.selections(layers)) == set(layers)
    on_second = partial(evaluate_plan, encoder, data=batches[2:], loss=classify)
    for result, plan in ((found.result, found.plan), (found.dense, SelectionPlan())):
        assert result.window_losses == on_second(plan=plan).window_losses
    if fixed:
        assert found.result.active_share_mean <= 0.7
        assert {type(each) for each in found.plan.selections(layers).values()} == {TopK}
    first = MeasuredBatches(encoder, batches[:2], classify)
    best = PlanSearch(
        routing_statistics(first), partial(evaluate, first), *[FIXED_NUMBERS] * fixed
    ).within(0.7)
    assert found.plan == best.plan
    assert done[0] == "running all experts"


def test_calibration_to_a_loss(encoder: Encoder, batches: list[Batch]) -> None:
    found = calibrate(encoder, batches, classify, max_loss_increase=0.05)
    on_first = partial(evaluate_plan, encoder, data=batches[:2], loss=classify)
    limit = on_first(plan=SelectionPlan()).loss * 1.05
    result = on_first(plan=found.plan)
    assert result.loss <= limit
    assert result.active_share_mean < 1


def decoder_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return window_cross_entropy(model(batch[0]), batch[1])


class Wrapped(nn.Module):
    """A decoder as part of a model of somebody else."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.decoder(tokens).logits
        return logits


def counted(batch: tuple[Tensor, Tensor]) -> Tensor:
    return batch[1] != -100


BLOCKS = SelectionPlan.of_blocks((TopK(2), Threshold(0.9)), (TopK(1), Threshold(0.8)))


def test_a_wrapped_decoder_is_measured_as_a_language_model(
    decoder: Decoder, model: SparseModel, counts: ParameterCounts, text: HeldOut
) -> None:
    on_text = MeasuredText(model, text, counts)
    on_batches = MeasuredBatches(Wrapped(decoder), text.batches, decoder_loss, mask=counted)
    for plan in (SelectionPlan(), BLOCKS):
        expected, found = evaluate(on_text, plan), evaluate(on_batches, plan)
        assert found.window_losses == pytest.approx(expected.window_losses, rel=1e-5)
        assert found[1:4] == pytest.approx(expected[1:4], rel=1e-6)
        assert found.loss * 12 == pytest.approx(expected.loss * text.n_tokens, rel=1e-5)
    expected_of = routing_statistics(on_text)
    for name, router in routing_statistics(on_batches).layers.items():
        other = expected_of.layers[name.removeprefix("decoder.")]
        torch.testing.assert_close(router.probs_NE, other.probs_NE, rtol=1e-4, atol=1e-6)
        assert (router.kind, router.per_expert) == (other.kind, other.per_expert)
    assert evaluate_plan(model, BLOCKS, text).active_share_mean == pytest.approx(
        evaluate_plan(model, BLOCKS, text, counts).active_share_mean
    )


def test_a_wrapped_decoder_is_certified_as_a_language_model(
    decoder: Decoder, text: HeldOut
) -> None:
    expected = judge(compile_sparse(decoder, BLOCKS), text, decoder)
    found = compare_with_dense(Wrapped(decoder), BLOCKS, text.batches, decoder_loss, mask=counted)
    assert found.samples == expected.windows
    assert found.relative_gap == pytest.approx(expected.relative_gap, rel=1e-4)
    assert found.relative_gap_95 == pytest.approx(expected.relative_gap_95, rel=1e-4)
    for name in ("active_share_mean", "active_share_p50", "active_share_p95"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name))
    assert len(found.layers) == 4
    for kind in ("experts", "attention"):
        for block, errors in enumerate(getattr(expected, kind)):
            same = found.layers[f"decoder.{block_layer_name(block, kind)}"]
            assert list(same) == pytest.approx(list(errors), rel=1e-3, abs=1e-6)


def test_a_layer_runs_again_with_its_own_arguments(encoder: Encoder, batches: list[Batch]) -> None:
    """With a mask; of two experts, leaving out one changes just its part."""
    encoder.attention = MixtureOfAttentionHeads(8, 2, 2, 4, router=ROUTER, bias=True)
    encoder.eval()
    x, mask, _ = batches[0]
    plan = SelectionPlan(attention=TopK(1))
    found = token_errors(encoder, plan, lambda: encoder(x, mask))["attention"]
    torch.testing.assert_close(found.error, found.bound, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        tokens = encoder.stem(x)
        dense = encoder.attention(tokens, mask=mask).output
        sparse = encoder.attention(tokens, TopK(1), mask=mask).output
    expected = (sparse - dense).norm(dim=-1) / dense.norm(dim=-1)
    torch.testing.assert_close(found.error.float(), expected.flatten(), rtol=1e-4, atol=1e-5)
    unpadded = token_errors(encoder, plan, lambda: encoder(x))["attention"]
    assert not torch.allclose(unpadded.error, found.error)


def test_calls_of_a_layer_follow_each_other(encoder: Encoder) -> None:
    x, y = torch.randn(2, 3, 6, 4)

    def errors_of(*inputs: Tensor) -> dict[str, TokenErrors]:
        return token_errors(encoder, PLAN, lambda: [encoder(each) for each in inputs])

    one, other, both = errors_of(x), errors_of(y), errors_of(x, y)
    for name, found in both.items():
        for rows, first, second in zip(found, one[name], other[name], strict=True):
            torch.testing.assert_close(rows, torch.cat([first, second]))


def test_the_model_is_left_as_it_was(encoder: Encoder, batches: list[Batch]) -> None:
    encoder.train()
    encoder.first.eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    found = compare_with_dense(encoder, PLAN, batches, classify)
    assert found == compare_with_dense(encoder, PLAN, batches, classify)  # nothing is dropped out
    assert encoder.training
    assert encoder.last.layer.training
    assert not encoder.first.training
    assert all(torch.equal(each, before[name]) for name, each in encoder.state_dict().items())
    assert not any(module._forward_hooks for module in encoder.modules())
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        token_errors(encoder, PLAN, lambda: encoder(torch.randn(1, 2, 3)))
    assert not any(module._forward_hooks for module in encoder.modules())
    assert encoder.training
    classify(encoder, batches[0]).mean().backward()  # type: ignore[no-untyped-call]


def test_a_comparison_is_the_certificate_of_an_artifact(
    encoder: Encoder, batches: list[Batch], tmp_path: Path
) -> None:
    found = compare_with_dense(encoder, PLAN, batches, classify)
    compile_sparse(encoder, PLAN).save(tmp_path / "model", certificate=found.to_dict())
    saved = json.loads((tmp_path / "model" / "certificate.json").read_text())
    assert saved["layers"] == {n: e._asdict() for n, e in found.layers.items()}
    assert saved["sparse_loss"] == found.sparse_loss
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"- loss {found.sparse_loss:.3f}, " in card
    assert "nats" not in card


def scalar(model: nn.Module, batch: Batch) -> Tensor:
    return classify(model, batch).mean()


def number(model: nn.Module, batch: Batch) -> Any:
    return 1.5


def no_number(model: nn.Module, batch: Batch) -> Tensor:
    return classify(model, batch) * float("nan")


MEASURES: dict[str, Callable[..., object]] = {
    "evaluate_plan": lambda model, batches, loss: evaluate_plan(model, PLAN, batches, loss=loss),
    "sweep": sweep,
    "calibrate": partial(calibrate, budget=0.7),
    "compare_with_dense": lambda model, batches, loss: compare_with_dense(
        model, PLAN, batches, loss
    ),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (scalar, ValueError, r"loss of every sample, a tensor \[B\].*got a tensor of shape \(\)"),
        (number, ValueError, r"loss of every sample, a tensor \[B\].*got 1\.5"),
        (no_number, FloatingPointError, "the loss is nan"),
    ],
)
def test_losses_that_are_none(
    measure: str,
    loss: Any,
    error: type[Exception],
    message: str,
    encoder: Encoder,
    batches: list[Batch],
) -> None:
    with pytest.raises(error, match=message):
        MEASURES[measure](encoder, batches, loss)


@pytest.mark.parametrize("measure", MEASURES)
def test_nothing_to_measure(measure: str, encoder: Encoder, batches: list[Batch]) -> None:
    call = MEASURES[measure]
    with pytest.raises(ValueError, match="one batch or more, got none"):
        call(encoder, iter([]), classify)
    with pytest.raises(ValueError, match=r"needs a model with routed layers.*Linear has none"):
        call(nn.Linear(2, 3), batches, classify)
    empty = [(x[:0], mask[:0], labels[:0]) for x, mask, labels in batches]
    with pytest.raises(ValueError, match="no token or sample"):
        evaluate_plan(encoder, PLAN, empty, loss=classify)


def test_other_mistakes(encoder: Encoder, batches: list[Batch], text: HeldOut) -> None:
    with pytest.raises(TypeError, match=r"any other model needs loss=.*got Encoder and list"):
        evaluate_plan(encoder, PLAN, batches)
    with pytest.raises(TypeError, match="got Encoder and HeldOut"):
        sweep(encoder, text)
    with pytest.raises(ValueError, match="two batches or more are needed, got 1"):
        calibrate(encoder, batches[:1], classify, budget=0.5)
    with pytest.raises(ValueError, match=r"budget of 0\.01 cannot be met: one expert in each"):
        calibrate(encoder, batches, classify, budget=0.01)
    for wishes in ({}, {"budget": 0.5, "max_loss_increase": 0.1}):
        with pytest.raises(ValueError, match="either a budget or a max_loss_increase, got "):
            calibrate(encoder, batches, classify, **wishes)
    with pytest.raises(ValueError, match=r"max_loss_increase must be 0 or more, got -0\.1"):
        calibrate(encoder, batches, classify, max_loss_increase=-0.1)
    with pytest.raises(ValueError, match=r"needs a loss above 0 with all experts, this one is -"):
        compare_with_dense(encoder, PLAN, batches, lambda m, b: -classify(m, b))
    with pytest.raises(ValueError, match=r"a mask of shape \(3, 5\)"):
        routing_statistics(
            MeasuredBatches(encoder, batches, classify, mask=lambda batch: batch[1][:, :5])
        )
    with pytest.raises(ValueError, match="no routed layer was called"):
        evaluate_plan(encoder, PLAN, batches, loss=lambda _, batch: batch[0].mean((1, 2)))
    with pytest.raises(ValueError, match="no routed layer 'middle'"):
        evaluate_plan(encoder, SelectionPlan(layers={"middle": TopK(1)}), batches, loss=classify)


def test_a_layer_that_is_never_called(encoder: Encoder, batches: list[Batch]) -> None:
    encoder.unused = MixtureOfExperts(8, 3, 2)
    with pytest.raises(ValueError, match="no batch calls unused"):
        routing_statistics(MeasuredBatches(encoder, batches, classify))
    with_it = evaluate_plan(encoder, PLAN, batches, loss=classify)
    del encoder.unused
    without = evaluate_plan(encoder, PLAN, batches, loss=classify)
    assert with_it.loss == without.loss
    assert with_it.active_share_mean < without.active_share_mean  # it runs for no token


def test_a_cache_would_grow_twice() -> None:
    layer = MixtureOfAttentionHeads(8, 3, 2, 4)
    model = nn.ModuleDict({"attention": layer})
    cache = KVCache(1, layer.n_kv_heads, 4, layer.d_head)
    with pytest.raises(ValueError, match="without KV caches, but attention is called with one"):
        token_errors(model, SelectionPlan(), lambda: layer(torch.randn(1, 4, 8), cache=cache))
