"""Decoders from training checkpoints."""

import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.routing import LinearRouter
from lightning_dsmoe.serialization.architecture import describe_decoder
from lightning_dsmoe.serialization.checkpoint import (
    check_state,
    load_decoder,
    read_checkpoint,
)
from lightning_dsmoe.training.language_model import DSMoELanguageModel

from ..inference.conftest import ATTENTION, FEED_FORWARD, rotary_glu
from .conftest import Forge, Trained


class Hasty(LinearRouter):
    """Keeps something that no state dict holds."""

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__(d_model, n_experts)
        self.register_buffer("shift", torch.ones(n_experts), persistent=False)


class Forgetful(LinearRouter):
    def __init__(self, d_model: int, n_experts: int, *, spread: float = 0.5) -> None:
        super().__init__(d_model, n_experts, init_std=spread)


def test_the_decoder_of_a_checkpoint(trained: Trained, tokens: Tensor) -> None:
    loaded = load_decoder(trained.path)
    trained.model.eval()
    assert not loaded.decoder.training
    assert torch.equal(loaded.decoder(tokens).logits, trained.model(tokens).logits)
    assert loaded.decoder.head.weight is loaded.decoder.embedding.weight
    assert describe_decoder(loaded.decoder) == describe_decoder(trained.model.decoder)
    assert loaded.tokenizer is None
    assert loaded.context is None
    assert load_decoder(str(trained.path)).decoder.n_layers == 2


def test_what_a_checkpoint_says_of_its_data(forge: Forge) -> None:
    loaded = load_decoder(forge(tokenizer={"kind": "bytes"}, context=8))
    assert loaded.tokenizer == {"kind": "bytes"}
    assert loaded.context == 8
    assert loaded.val_fraction is loaded.test_fraction is None
    loaded = load_decoder(forge(val_fraction=0.25, test_fraction=0))
    assert (loaded.val_fraction, loaded.test_fraction) == (0.25, 0)
    for other in (20, 0, -0.5, 0.75, float("nan"), "0.5"):  # whatever another data module means
        loaded = load_decoder(forge(val_fraction=other, test_fraction=0.25))
        assert (loaded.val_fraction, loaded.test_fraction) == (None, None)


def test_loaded_weights_do_not_hang_on_the_file(forge: Forge, tokens: Tensor) -> None:
    path = forge()
    decoder = load_decoder(path).decoder
    expected = decoder(tokens).logits
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(decoder(tokens).logits, expected)


def test_a_loaded_decoder_can_be_trained_on(trained: Trained, tokens: Tensor) -> None:
    decoder = load_decoder(trained.path).decoder
    decoder(tokens).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_weights_of_fewer_bits(trained: Trained, forge: Forge) -> None:
    state = {name: value.bfloat16() for name, value in trained.model.state_dict().items()}
    decoder = load_decoder(forge(state_dict=state)).decoder
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.bfloat16}


def test_weights_of_another_model_are_listed_in_one_error(trained: Trained, forge: Forge) -> None:
    state = dict(trained.model.state_dict())
    norm, router = "blocks.0.attention_norm.weight", "blocks.1.feed_forward.router.weight"
    del state[f"decoder.{norm}"]
    state["decoder.blocks.2.norm"] = torch.zeros(1)
    state[f"decoder.{router}"] = torch.zeros(5, 16)
    state["decoder.norm.weight"] = torch.ones(16, dtype=torch.int64)
    path = forge(state_dict=state)
    message = (
        rf"missing {norm}; unknown blocks\.2\.norm; {router} is \(5, 16\), not \(4, 16\); "
        r"norm\.weight is torch\.int64, not torch\.float32$"
    )
    with pytest.raises(ValueError, match=message):
        load_decoder(path)


def test_weights_that_are_not_finite(trained: Trained, forge: Forge) -> None:
    state = {**trained.model.state_dict(), "decoder.norm.weight": torch.full((16,), torch.nan)}
    path = forge(state_dict=state)
    with pytest.raises(ValueError, match=r"not finite: norm\.weight holds NaN or infinity$"):
        load_decoder(path)


def test_states_that_fit() -> None:
    state = rotary_glu().state_dict()
    check_state(state, state)
    check_state(state, {name: tensor.double() for name, tensor in state.items()})
    check_state({}, {})


def test_an_architecture_of_another_size_is_refused(trained: Trained, forge: Forge) -> None:
    architecture = describe_decoder(trained.model.decoder)
    architecture["feed_forward"]["init_args"]["n_experts"] = 6
    with pytest.raises(ValueError, match=r"router\.weight is \(4, 16\), not \(6, 16\)"):
        load_decoder(forge(architecture=architecture))


def test_values_outside_the_state_cannot_be_restored(tmp_path: Path) -> None:
    feed_forward = partial(FEED_FORWARD, router=Hasty)
    path = Trained(tmp_path / "hasty.ckpt", feed_forward=feed_forward).save().path
    message = r"buffers must be persistent .* blocks\.0\.feed_forward\.router\.shift, blocks\.1"
    with pytest.raises(ValueError, match=message):
        load_decoder(path)


def test_a_model_without_description_is_saved_with_a_warning(tmp_path: Path) -> None:
    feed_forward = partial(FEED_FORWARD, router=Forgetful)
    trained = Trained(tmp_path / "model.ckpt", feed_forward=feed_forward)
    with pytest.warns(UserWarning, match="do not hold its architecture: Forgetful does not keep"):
        trained.save()
    with pytest.raises(ValueError, match=r"read it with load_from_checkpoint of the class"):
        load_decoder(trained.path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loaded = DSMoELanguageModel.load_from_checkpoint(
            trained.path, attention=ATTENTION, feed_forward=feed_forward
        )
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("class_path", ["os.system", "antigravity.Router"])
def test_hyperparameters_that_name_other_classes_are_refused(
    class_path: str, trained: Trained, forge: Forge
) -> None:
    saved = read_checkpoint(trained.path)["hyper_parameters"]
    attention = {
        "class_path": "lightning_dsmoe.MixtureOfAttentionHeads",
        "init_args": {"n_experts": 3, "n_heads": 1, "d_head": 4},
    }
    feed_forward = {
        "class_path": "lightning_dsmoe.MixtureOfExperts",
        "init_args": {"n_experts": 4, "d_expert": 6, "router": {"class_path": class_path}},
    }
    path = forge(hyper_parameters={**saved, "attention": attention, "feed_forward": feed_forward})
    with pytest.raises(ValueError, match=f"'{class_path}' is not a known Router"):
        DSMoELanguageModel.load_from_checkpoint(path)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("part", ["attention", "feed_forward"])
def test_full_and_short_paths_are_no_difference_when_resuming(
    part: str, trained: Trained, forge: Forge
) -> None:
    architecture = describe_decoder(trained.model.decoder)
    module = getattr(trained.model.decoder.blocks[0], part)
    cls = type(module)
    architecture[part]["class_path"] = f"{cls.__module__}.{cls.__name__}"
    path = forge(architecture=architecture)
    loaded = DSMoELanguageModel.load_from_checkpoint(
        path, attention=ATTENTION, feed_forward=FEED_FORWARD
    )
    assert torch.equal(loaded.decoder.embedding.weight, trained.model.decoder.embedding.weight)
    changed = partial(FEED_FORWARD, n_experts=5)
    with pytest.raises(ValueError, match=r"another model: feed_forward\.n_experts was 4, is 5$"):
        DSMoELanguageModel.load_from_checkpoint(path, attention=ATTENTION, feed_forward=changed)
