"""A Llama of mixtures in transformers, for a few steps."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from examples import hugging_face
from lightning_dsmoe import RoutingLoss, record_routings, run_plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]

Llama = Any
DENSE, SPARSE = hugging_face.PLANS.values()


@pytest.fixture(scope="module")
def pieces() -> list[hugging_face.Example]:
    return hugging_face.text()


def batch(pieces: list[hugging_face.Example]) -> hugging_face.Example:
    return {name: torch.stack([piece[name] for piece in pieces]) for name in pieces[0]}


@pytest.mark.parametrize(
    "train", [hugging_face.train_by_transformers, hugging_face.train_by_lightning]
)
def test_it_learns(
    train: Callable[..., None],
    pieces: list[hugging_face.Example],
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = hugging_face.llama()
    routers = [layer.mlp.layer.router.weight.detach().clone() for layer in model.model.layers]
    before = hugging_face.held_out_loss(model, pieces[:32], DENSE)
    train(model, pieces[32:], steps=20)
    dense, sparse = (hugging_face.held_out_loss(model, pieces[:32], p) for p in (DENSE, SPARSE))
    assert dense < before - 1
    assert sparse < before - 1
    assert sparse != dense
    for layer, weight in zip(model.model.layers, routers, strict=True):
        assert not torch.equal(layer.mlp.layer.router.weight, weight)


def test_all_experts_generate_what_the_model_generates() -> None:
    model = hugging_face.llama().eval()
    text = hugging_face.continuation(model, b"def ", DENSE, 16)
    tokens = torch.tensor([[*b"def "]])
    plain = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=16, do_sample=False
    )
    assert bytes(plain[0].tolist()).decode(errors="replace") == text


def test_a_plan_holds_for_every_token_that_is_generated() -> None:
    model = hugging_face.llama().eval()
    tokens = torch.tensor([[*b"def "]])
    with run_plan(model, SPARSE), record_routings(model) as record:
        model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8)
    for active in record.active_masks().values():
        assert active.flatten(0, -2).sum(-1).tolist() == [3] * (4 + 7)  # the last is not read


def test_checkpointing_changes_no_gradient(pieces: list[hugging_face.Example]) -> None:
    plain = hugging_face.llama().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    assert checkpointed.is_activation_checkpointing
    inputs = batch(pieces[:4])
    routing_loss = RoutingLoss(0.1)
    losses = []
    for model in (plain, checkpointed):
        with record_routings(model, mask=inputs["attention_mask"].bool()) as record:
            loss = model(**inputs).loss
        loss = loss + routing_loss(record)
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_reentrant_checkpointing_is_refused(pieces: list[hugging_face.Example]) -> None:
    model = hugging_face.llama().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with record_routings(model) as record:
        model(**batch(pieces[:2]))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        RoutingLoss()(record)
