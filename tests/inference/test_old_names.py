"""Names of version 0.1 still work, with a warning."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.callbacks import SparseCompile
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference import SparseModel, SwitchPoints, compile_sparse, generate
from lightning_dsmoe.inference.engine.engine import Engine
from lightning_dsmoe.routing import SelectionPlan

from .conftest import UNCOMPILED

PLAN = SelectionPlan()


def test_context(one_decoder: Decoder, tokens: Tensor) -> None:
    short = generate(one_decoder, tokens[:, :4], 9, temperature=0, context_length=5)
    old = r"is now context_length=; the old name goes with version 0\.3"
    with pytest.warns(DeprecationWarning, match=rf"^generate\(context=\) {old}"):
        actual = generate(one_decoder, tokens[:, :4], 9, temperature=0, context=5)  # type: ignore[call-arg]
    assert torch.equal(actual, short)
    with pytest.warns(DeprecationWarning, match=rf"^compile_sparse\(context=\) {old}"):
        model = compile_sparse(one_decoder, PLAN, switch_points=UNCOMPILED, context=5)  # type: ignore[call-arg]
    assert torch.equal(model.generate(tokens[:, :4], 9, temperature=0), short)
    with pytest.warns(DeprecationWarning, match=r"^SparseModel\.context is now context_length;"):
        assert model.context == 5
    with pytest.warns(DeprecationWarning, match=r"^SparseModel\.context is now context_length;"):
        model.context = 13
    assert model.context_length == 13
    with pytest.warns(DeprecationWarning, match=rf"^SparseModel\.generate\(context=\) {old}"):
        actual = model.generate(tokens[:, :4], 9, temperature=0, context=5)
    assert torch.equal(actual, short)
    with pytest.warns(DeprecationWarning, match=rf"^SparseModel\(context=\) {old}"):
        model = SparseModel(one_decoder, PLAN, architecture={}, context=5)  # type: ignore[call-arg]
    assert model.context_length == 5


def test_calibrate(one_decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    points = SwitchPoints(gather_up_to=7)
    monkeypatch.setattr(SparseModel, "tune", lambda self: points)
    model = compile_sparse(one_decoder, PLAN, switch_points=UNCOMPILED)
    with pytest.warns(DeprecationWarning, match=r"^SparseModel\.calibrate is now tune;"):
        assert model.calibrate() == points
    with pytest.warns(DeprecationWarning, match=r"SparseCompile\(calibrate=\) is now tune="):
        assert SparseCompile(SelectionPlan(), calibrate=True).tune
    assert SparseCompile(SelectionPlan(), tune=True).tune
    assert not SparseCompile(SelectionPlan()).tune


def test_a_model_that_was_pickled_whole(one_decoder: Decoder, tokens: Tensor) -> None:
    model = compile_sparse(one_decoder, PLAN, switch_points=UNCOMPILED, context_length=5)
    of_engine = model.engine.__getstate__() | {"_warned": False}
    del of_engine["max_tokens"], of_engine["can_compile"]
    engine = Engine.__new__(Engine)
    engine.__setstate__(of_engine)
    state = vars(model) | {"engine": engine, "context": model.context_length}
    del state["context_length"]
    loaded = SparseModel.__new__(SparseModel)
    loaded.__setstate__(state)
    expected = model.generate(tokens[:, :4], 9, temperature=0)
    assert torch.equal(loaded.generate(tokens[:, :4], 9, temperature=0), expected)


def test_layers_that_were_pickled_before_they_had_some_options(
    one_decoder: Decoder, tokens: Tensor
) -> None:
    older = copy.deepcopy(one_decoder)
    for block in older.blocks:
        vars(block.attention.heads)["rope_theta"] = block.attention.rope_theta
        del vars(block.attention.heads)["rotary"]
        del vars(block.feed_forward)["shared_gate"]
    loaded = pickle.loads(pickle.dumps(older))
    assert torch.equal(loaded(tokens).logits, one_decoder(tokens).logits)
