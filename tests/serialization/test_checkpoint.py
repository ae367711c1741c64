"""Decoders from training checkpoints, and files that are something else."""

import os
import sys
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dsmoe.routing import LinearRouter
from lightning_dsmoe.serialization.architecture import describe_decoder
from lightning_dsmoe.serialization.checkpoint import (
    check_sharing,
    check_state,
    load_decoder,
    read_checkpoint,
)
from lightning_dsmoe.training.language_model import DSMoELanguageModel

from ..inference.conftest import ATTENTION, FEED_FORWARD, rotary_glu


class Hasty(LinearRouter):
    """Keeps something that no state dict holds."""

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__(d_model, n_experts)
        self.register_buffer("shift", torch.ones(n_experts), persistent=False)


class Forgetful(LinearRouter):
    def __init__(self, d_model: int, n_experts: int, *, spread: float = 0.5) -> None:
        super().__init__(d_model, n_experts, init_std=spread)


class Trained:
    """A model after two steps, and the trainer that writes its checkpoint."""

    def __init__(self, path: Path, **options: Any) -> None:
        torch.manual_seed(5)
        self.path = path
        self.model = DSMoELanguageModel(
            29, 16, 2, **{"attention": ATTENTION, "feed_forward": FEED_FORWARD, **options}
        )
        self.trainer = Trainer(
            accelerator="cpu",
            max_steps=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        windows = [{"input_ids": t[:-1], "labels": t[1:]} for t in torch.randint(29, (4, 9))]
        loader = DataLoader(windows, batch_size=2)  # type: ignore[arg-type]
        self.trainer.fit(self.model, loader, loader)

    def save(self) -> "Trained":
        self.trainer.save_checkpoint(self.path)
        return self


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained") / "model.ckpt").save()


Forge = Callable[..., Path]


@pytest.fixture
def forge(trained: Trained, tmp_path: Path) -> Forge:
    def write(**changes: object) -> Path:
        checkpoint = {**torch.load(trained.path, weights_only=True), **changes}
        kept = {name: value for name, value in checkpoint.items() if value is not ...}
        torch.save(kept, tmp_path / "forged.ckpt")
        return tmp_path / "forged.ckpt"

    return write


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


def test_truncated_files(trained: Trained, tmp_path: Path) -> None:
    whole = trained.path.read_bytes()
    path = tmp_path / "part.ckpt"
    for length in (0, 1, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"part\.ckpt is damaged or not a checkpoint"):
            load_decoder(path)


@pytest.mark.parametrize("garbage", [b"hello", bytes(500), b"PK\3\4" + bytes(200), b"\x80\x02]."])
def test_other_files(garbage: bytes, tmp_path: Path) -> None:
    (tmp_path / "other.ckpt").write_bytes(garbage)
    with pytest.raises(ValueError, match=r"other\.ckpt is damaged or not a checkpoint[^\n]*$"):
        load_decoder(tmp_path / "other.ckpt")


@pytest.mark.parametrize("error", [MemoryError, PermissionError(13, "not permitted")])
def test_what_is_no_fault_of_the_file_is_told_as_it_is(
    error: Any, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        read_checkpoint(trained.path)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.ckpt", tmp_path):
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            load_decoder(path)


class Bomb:
    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.crater),)


@pytest.mark.parametrize("place", ["hyper_parameters", "state_dict", "extra"])
def test_code_in_a_file_does_not_run(place: str, forge: Forge, tmp_path: Path) -> None:
    crater = tmp_path / "crater"
    path = forge(**{place: {"weight": Bomb(crater)}})
    for load in (load_decoder, DSMoELanguageModel.load_from_checkpoint):
        with pytest.raises(ValueError, match=r"holds more than data, .*: \w+\.mkdir$"):
            load(path)
        assert not crater.exists()
    torch.load(path, weights_only=False)
    assert crater.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "has format 2, this version reads 1; another version of"),
        ({"format_version": 0}, "has format 0, this version reads 1"),
        ({"format_version": ...}, "not a checkpoint of DSMoELanguageModel: no format_version"),
        ({"state_dict": ...}, "is not a checkpoint: it has no state_dict of tensors"),
        ({"state_dict": [1]}, "is not a checkpoint: it has no state_dict of tensors"),
        ({"state_dict": {"weight": 1.0}}, "is not a checkpoint: it has no state_dict of tensors"),
        ({"state_dict": {}}, r"missing embedding\.weight; .*missing head\.weight"),
        ({"architecture": None}, "does not hold its architecture, .*load_from_checkpoint"),
        ({"architecture": ...}, "does not hold its architecture"),
        ({"architecture": {}}, "architecture must have the fields"),
    ],
)
def test_other_checkpoints(changes: dict[str, Any], message: str, forge: Forge) -> None:
    with pytest.raises(ValueError, match=message):
        load_decoder(forge(**changes))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1, 16).expand(2**22, 16),
        torch.zeros(3, 3).to_sparse(),
        torch.zeros(3).to("meta"),
    ],
    ids=["repeated", "sparse", "empty"],
)
def test_tensors_that_are_not_whole(tensor: Tensor, forge: Forge, trained: Trained) -> None:
    state = trained.model.state_dict() | {"decoder.embedding.weight": tensor}
    with pytest.raises(ValueError, match=r"decoder\.embedding\.weight' is not a plain tensor"):
        load_decoder(forge(state_dict=state))
    with pytest.raises(ValueError, match="has no state_dict of tensors"):
        load_decoder(forge(state_dict={0: tensor}))


def repacked(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    weight = torch.load(path)["state_dict"]["decoder.embedding.weight"]
    content[content.index(weight.numpy().tobytes()) + 100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [(repacked, "is compressed"), (flipped, "does not match its checksum")],
)
def test_files_that_were_changed(
    change: Callable[[Path], None], message: str, forge: Forge, trained: Trained
) -> None:
    path = forge()
    change(path)
    message = rf"forged\.ckpt is damaged or not a checkpoint: .*{message}"
    for load in (load_decoder, read_checkpoint, DSMoELanguageModel.load_from_checkpoint):
        with pytest.raises(ValueError, match=message):
            load(path)
    with path.open("rb") as opened, pytest.raises(ValueError, match=message.partition(": ")[2]):
        DSMoELanguageModel.load_from_checkpoint(opened)


def test_optimizer_states_that_are_larger_than_the_file(forge: Forge) -> None:
    repeated = torch.zeros(1).expand(2**40)
    circle: list[object] = [{"state": {0: {"exp_avg": repeated}}}]
    circle.append(circle)
    with pytest.raises(ValueError, match="optimizer's state needs plain tensors"):
        read_checkpoint(forge(optimizer_states=circle))


def test_weights_that_share_their_values() -> None:
    tied, other = torch.zeros(6, 3), torch.zeros(2)
    check_sharing({"embedding": tied, "head": tied, "norm": other})
    with pytest.raises(ValueError, match="the weights share their values"):
        check_sharing({str(layer): tied for layer in range(3)})
    with pytest.raises(ValueError, match="the weights share their values"):
        check_sharing({str(row): tied.flatten()[row:][:9] for row in range(6)})


def test_a_file_of_no_dictionary(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="it has no state_dict of tensors"):
        read_checkpoint(tmp_path / "list.ckpt")


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
    with pytest.raises(ValueError, match=r"read it with DSMoELanguageModel\.load_from_checkpoint"):
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
