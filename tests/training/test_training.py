"""What one training step computes, and that training works."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dsmoe.decoder import Block
from lightning_dsmoe.losses import (
    consistency_loss,
    load_balancing_loss,
    mutual_information_loss,
    router_z_loss,
)
from lightning_dsmoe.routing import SelectionPlan, TopK
from lightning_dsmoe.training.language_model import DSMoELanguageModel

MakeModel = Callable[..., DSMoELanguageModel]
Batch = dict[str, Tensor]
WITHOUT_LOSSES = {"expert_mi_weight": 0.0, "attention_mi_weight": 0.0}

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")


def language_loss(model: DSMoELanguageModel, batch: Batch) -> Tensor:
    logits = model(batch["input_ids"]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def gradients(model: DSMoELanguageModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("selected", [None, 2], ids=["dense", "top-2"])
def test_total_is_the_language_loss_plus_the_weighted_losses_of_every_router(
    make_model: MakeModel, batch: Batch, selected: int | None
) -> None:
    selection = {} if selected is None else {"expert_selection": TopK(selected)}
    model = make_model(
        expert_mi_weight=0.3,
        attention_mi_weight=0.07,
        load_balancing_weight=0.11,
        router_z_weight=0.013,
        **selection,
    ).eval()
    expected = language_loss(model, batch)
    routings = model(batch["input_ids"]).routings
    mask = batch["labels"] != -100
    for weight, kind in ((0.3, routings.experts), (0.07, routings.attention)):
        for routing in kind:
            assert routing is not None
            expected = expected + weight * mutual_information_loss(routing.probs, mask)
            active = torch.ones_like(routing.probs, dtype=torch.bool)
            if selected is not None and kind is routings.experts:
                active = TopK(selected).mask(routing.probs)
            expected = expected + 0.11 * load_balancing_loss(routing.probs, active, mask)
            expected = expected + 0.013 * router_z_loss(routing.logits, mask)
    torch.testing.assert_close(model.training_step(batch, 0)["loss"], expected)


def test_consistency_trains_a_plan_and_all_experts_and_keeps_them_alike(
    make_model: MakeModel, batch: Batch
) -> None:
    weights = {"expert_mi_weight": 0.3, "attention_mi_weight": 0.07, "load_balancing_weight": 0.11}
    sparse = {"expert_selection": TopK(1), "attention_selection": TopK(2)}
    plan, dense = make_model(**weights, **sparse).eval(), make_model(**weights).eval()
    logits = [each(batch["input_ids"]).logits for each in (plan, dense)]
    apart = consistency_loss(*logits, batch["labels"] != -100)
    assert apart > 1e-6
    expected = sum(each.training_step(batch, 0)["loss"] for each in (plan, dense)) / 2 + 3 * apart
    model = make_model(**weights, **sparse, consistency_weight=3.0).eval()
    step = model.training_step(batch, 0)
    torch.testing.assert_close(step["loss"], expected)
    for loss in (expected, step["loss"]):
        loss.backward()
    for (name, found), *both in zip(
        model.named_parameters(), plan.parameters(), dense.parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, sum(each.grad for each in both), msg=name)
    routings = plan(batch["input_ids"]).routings
    for kind, expected_kind in zip(step["routings"], routings, strict=True):
        for routing, expected_routing in zip(kind, expected_kind, strict=True):
            assert torch.equal(routing.logits, expected_routing.logits)


@pytest.mark.parametrize("runs", [1, 2])
def test_all_experts_run_beside_a_plan_and_not_beside_themselves(
    make_one_model: MakeModel, batch: Batch, runs: int
) -> None:
    selection = {"expert_selection": TopK(1)} if runs == 2 else {}
    model = make_one_model(consistency_weight=2.0, **selection)
    plans: list[SelectionPlan] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: plans.append(inputs[1]))
    model.training_step(batch, 0)
    assert plans == [model.plan, SelectionPlan()][:runs]


def test_weights_of_zero_give_bitwise_the_gradient_of_the_language_loss(
    make_model: MakeModel, batch: Batch
) -> None:
    without = make_model(**WITHOUT_LOSSES).eval()
    found = gradients(without, without.training_step(batch, 0)["loss"])
    expected = gradients(without, language_loss(without, batch))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    usual = make_model().eval()
    changed = gradients(usual, usual.training_step(batch, 0)["loss"])
    routers = [name for name in expected if ".router." in name]
    assert len(routers) == 2 * usual.n_layers
    assert not any(torch.equal(changed[name], expected[name]) for name in routers)


def test_steps_return_what_callbacks_read(make_model: MakeModel, batch: Batch) -> None:
    model = make_model()
    for step in (model.training_step, model.validation_step, model.test_step):
        outputs = step(batch, 0)
        assert torch.equal(outputs["mask"], batch["labels"] != -100)
        for kind, sizes in zip(outputs["routings"], model.decoder.plan_sizes, strict=True):
            for routing, size in zip(kind, sizes, strict=True):
                assert routing.probs.shape == routing.logits.shape == (3, 16, size)
                assert not routing.probs.requires_grad
                assert not routing.logits.requires_grad


def test_a_batch_without_labels_costs_nothing(make_model: MakeModel, batch: Batch) -> None:
    model = make_model()
    loss = model.training_step({**batch, "labels": torch.full_like(batch["labels"], -100)}, 0)
    assert loss["loss"].item() == 0
    assert not any(gradient.any() for gradient in gradients(model, loss["loss"]).values())


def test_predictions_are_the_loss_of_each_token(make_model: MakeModel, batch: Batch) -> None:
    model = make_model().eval()
    nll = model.predict_step(batch, 0)
    counted = batch["labels"] != -100
    assert (nll[~counted] == 0).all()
    torch.testing.assert_close(nll[counted].mean(), language_loss(model, batch))


def test_the_decoder_is_built_once(make_model: MakeModel) -> None:
    model = make_model()
    decoder = model.decoder
    model.configure_model()
    assert model.decoder is decoder


@pytest.mark.parametrize(
    "name",
    [
        "expert_mi_weight",
        "attention_mi_weight",
        "load_balancing_weight",
        "router_z_weight",
        "consistency_weight",
    ],
)
def test_negative_weights_are_refused(make_one_model: MakeModel, name: str) -> None:
    with pytest.raises(ValueError, match=r"must be 0 or more, got .*-0\.1"):
        make_one_model(**{name: -0.1})


@pytest.mark.parametrize("kind", ["expert_selection", "attention_selection"])
def test_selections_that_no_layer_has_are_refused(make_one_model: MakeModel, kind: str) -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\..*TopK\(k=9\) needs k <= 4"):
        make_one_model(**{kind: TopK(9)})


@pytest.mark.parametrize(
    ("make_model", "options"),
    [
        pytest.param("rotary", {}, id="dense"),
        pytest.param(
            "learned",
            {
                "expert_selection": TopK(2),
                "attention_selection": TopK(1),
                "load_balancing_weight": 0.01,
                **WITHOUT_LOSSES,
            },
            id="sparse",
        ),
    ],
    indirect=["make_model"],
)
def test_loss_falls(
    make_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    options: dict[str, Any],
) -> None:
    model = make_model(optimizer=partial(torch.optim.AdamW, lr=3e-3), **options)
    trainer = make_trainer(max_steps=60, logger=False)
    [before] = trainer.validate(model, make_loader(), verbose=False)
    trainer.fit(model, make_loader(), make_loader(3))
    [after] = trainer.validate(model, make_loader(), verbose=False)
    assert before["val/loss"] == pytest.approx(math.log(model.vocab_size), abs=0.2)
    assert after["val/loss"] < before["val/loss"] - 1


def test_selections_of_training_run_unless_a_plan_is_given(
    make_model: MakeModel, batch: Batch
) -> None:
    model = make_model(expert_selection=TopK(1), attention_selection=TopK(2)).eval()
    tokens = batch["input_ids"]
    plan = SelectionPlan(experts=TopK(1), attention=TopK(2))
    dense = SelectionPlan()
    assert torch.equal(model(tokens).logits, model.decoder(tokens, plan).logits)
    assert torch.equal(model(tokens, dense).logits, model.decoder(tokens).logits)
    assert not torch.allclose(model(tokens).logits, model(tokens, dense).logits)


def test_half_precision_keeps_routing_and_weights_whole(
    make_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    outputs: Any,
) -> None:
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer(precision="bf16-mixed", max_steps=2, callbacks=[outputs])
    trainer.fit(model, make_loader(), make_loader(3))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, before[name]), name
    for output in outputs.outputs:
        assert output["loss"].dtype == torch.float32
        assert {r.probs.dtype for kind in output["routings"] for r in kind} == {torch.float32}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by dynamo too
def test_compiled_blocks_train_alike_under_the_same_names(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = []

    def compile_quickly(block: Block) -> None:
        compiled.append(block)
        nn.Module.compile(block, backend="eager")

    monkeypatch.setattr(Block, "compile", compile_quickly)
    states = []
    for compile_blocks in (False, True):
        model = make_one_model(compile_blocks=compile_blocks)
        make_trainer(max_steps=2).fit(model, make_loader(), make_loader(3))
        states.append(model.state_dict())
    assert compiled == list(model.decoder.blocks)
    torch.testing.assert_close(states[1], states[0])
