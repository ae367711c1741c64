"""Checkpoints of models built in Python and of models built by the command line."""

import io
import re
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn

from lightning_dsmoe.routing import LinearRouter, Router, SelectionPlan, Threshold, TopK
from lightning_dsmoe.training.language_model import DSMoELanguageModel

pytestmark = pytest.mark.slow

MakeModel = Callable[..., DSMoELanguageModel]
Save = Callable[..., Path]
load = DSMoELanguageModel.load_from_checkpoint

FACTORIES = {
    "attention": {
        "class_path": "lightning_dsmoe.attention.MixtureOfAttentionHeads",
        "init_args": {"n_experts": 4, "n_heads": 1, "d_head": 8},
    },
    "feed_forward": {
        "class_path": "lightning_dsmoe.experts.MixtureOfExperts",
        "init_args": {
            "n_experts": 4,
            "d_expert": 24,
            "experts": {
                "class_path": "lightning_dsmoe.experts.GLUExperts",
                "init_args": {"activation": "silu"},
            },
        },
    },
}
LARGE = {
    "class_path": FACTORIES["feed_forward"]["class_path"],
    "init_args": {**FACTORIES["feed_forward"]["init_args"], "d_expert": 2**24},
}
FROM_COMMAND_LINE = {
    "_instantiator": "lightning.pytorch.cli.instantiate_module",
    "_class_path": "lightning_dsmoe.training.language_model.DSMoELanguageModel",
    "vocab_size": 97,
    "d_model": 32,
    "n_layers": 2,
    "expert_mi_weight": 0.5,
    **FACTORIES,
}


@pytest.fixture
def save(make_one_model: MakeModel, make_trainer: Callable[..., Trainer], tmp_path: Path) -> Save:
    def to(model: DSMoELanguageModel | None = None, **changes: Any) -> Path:
        """Write a checkpoint and put other things into it."""
        trainer = make_trainer(logger=False)
        trainer.strategy.connect(model or make_one_model())
        path = tmp_path / "model.ckpt"
        trainer.save_checkpoint(path)
        torch.save({**torch.load(path), **changes}, path)
        return path

    return to


def factories(model: DSMoELanguageModel) -> dict[str, Any]:
    return {"attention": model.attention, "feed_forward": model.feed_forward}


def assert_equal(found: DSMoELanguageModel, expected: DSMoELanguageModel) -> None:
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


@pytest.mark.parametrize("given", [True, False], ids=["factories given", "path alone"])
def test_a_model_built_in_python(given: bool, make_model: MakeModel, save: Save) -> None:
    tokens = torch.randint(97, (2, 9))
    model = make_model(
        expert_mi_weight=0.125,
        norm=partial(nn.RMSNorm, eps=0.1),
        expert_selection=Threshold(0.9),
        attention_selection=TopK(1),
    ).eval()
    path = save(model)
    torch.manual_seed(99)
    options = {**factories(model), "norm": model.norm} if given else {}
    loaded = load(path, **options).eval()
    assert_equal(loaded, model)
    assert loaded.routing_loss.expert_mi == 0.125
    assert loaded.max_positions == model.max_positions
    assert loaded.plan == model.plan == SelectionPlan(Threshold(0.9), TopK(1))
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert load(path, **options, expert_mi_weight=0.5).routing_loss.expert_mi == 0.5
    assert load(path, **options, expert_selection=TopK(2)).plan == SelectionPlan(TopK(2), TopK(1))
    assert_equal(load(save(loaded)), model)


def test_layers_that_differ_are_rebuilt(make_one_model: MakeModel, save: Save) -> None:
    feed_forward = make_one_model().feed_forward
    model = make_one_model(feed_forward=[feed_forward, partial(feed_forward, n_experts=3)])
    assert_equal(load(save(model)), model)


def test_files_without_a_description_need_the_factories(
    make_one_model: MakeModel, save: Save
) -> None:
    model = make_one_model(expert_selection=TopK(1))
    path = save(model, architecture=None, training_plan=None)  # as of a part without its options
    with pytest.raises(ValueError, match="does not say attention, feed_forward of DSMoELanguageM"):
        load(path)
    assert_equal(load(path, **factories(model)), model)


def test_files_without_hyperparameters_name_what_is_missing(save: Save) -> None:
    path = save()
    checkpoint = torch.load(path)
    del checkpoint["hyper_parameters"]
    torch.save(checkpoint, path)
    missing = "vocab_size, d_model, n_layers"
    with pytest.raises(ValueError, match=rf"does not say {missing} of DSMoELanguageModel: pass"):
        load(path)
    assert load(path, vocab_size=97, d_model=32, n_layers=2).vocab_size == 97


def test_hyperparameters_that_are_one_argument(
    make_one_model: MakeModel, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    parts = factories(make_one_model())

    class Small(DSMoELanguageModel):
        def __init__(self, sizes: dict[str, int]) -> None:
            super().__init__(sizes["vocab_size"], 32, 2, **parts)
            self.hparams.clear()
            self.save_hyperparameters(sizes)

    model = Small({"vocab_size": 50})
    trainer = make_trainer(logger=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert_equal(Small.load_from_checkpoint(tmp_path / "model.ckpt"), model)


def test_a_device_that_there_is_not_is_no_fault_of_the_file(save: Save) -> None:
    path = save(hyper_parameters=FROM_COMMAND_LINE)
    with pytest.raises(RuntimeError, match=r"^map_location='nowhere': "):
        load(path, map_location="nowhere")


def test_a_description_names_known_classes_only(make_one_model: MakeModel, save: Save) -> None:
    architecture = torch.load(save())["architecture"]
    architecture["attention"]["class_path"] = "antigravity.Attention"
    with pytest.raises(ValueError, match=r"'antigravity\.Attention' is not a known"):
        load(save(architecture=architecture))
    assert "antigravity" not in sys.modules
    architecture = torch.load(save())["architecture"]
    architecture["feed_forward"]["init_args"]["d_expert"] = 2**24
    with pytest.raises(ValueError, match=r"w_in\.weight is .*, not "):
        load(save(architecture=architecture))
    bad = {**SelectionPlan().to_dict(), "experts": {"selection": "Bad"}}
    with pytest.raises(ValueError, match=r"'Bad'.* is not a selection"):
        load(save(training_plan=bad))


def test_checkpoints_are_plain_data_without_functions_or_objects(
    make_one_model: MakeModel, save: Save
) -> None:
    stored = torch.load(save(), weights_only=True)
    assert stored["hyper_parameters"].keys() >= {"vocab_size", "d_model", "expert_mi_weight"}
    given = {"attention", "feed_forward", "norm", "optimizer", "expert_selection"}
    assert not given & stored["hyper_parameters"].keys()
    assert stored["architecture"]["n_layers"] == 2
    assert "tokenizer" not in stored
    assert stored["context"] is None


def test_an_open_file_is_read_like_a_named_one(make_one_model: MakeModel, save: Save) -> None:
    model = make_one_model()
    opened = io.BytesIO(save(model).read_bytes())
    assert_equal(load(opened, **factories(model)), model)


def test_a_model_of_the_command_line_needs_nothing(make_one_model: MakeModel, save: Save) -> None:
    model = make_one_model(
        feed_forward=partial(make_one_model().feed_forward, router=LinearRouter),
        attention=partial(make_one_model().attention, router=LinearRouter),
    )
    loaded = load(save(model, hyper_parameters=FROM_COMMAND_LINE))
    assert_equal(loaded, model)
    assert loaded.routing_loss.expert_mi == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 2**24}, "weights are fewer than those of vocab_size=16777216"),
        ({"d_model": 2**24}, "weights are fewer than those of vocab_size=97 and d_model=16777216"),
        ({"n_layers": 64}, "n_layers was 2, is 64"),
        ({"feed_forward": LARGE}, "d_expert was 24, is 16777216"),
    ],
)
def test_sizes_in_a_checkpoint_take_no_memory(
    changes: dict[str, Any], message: str, make_one_model: MakeModel, save: Save
) -> None:
    path = save(hyper_parameters={**FROM_COMMAND_LINE, **changes})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="checkpoint is of another model: .*" + re.escape(message)):
        load(path)
    if "weights" in message:
        with pytest.raises(ValueError, match=re.escape(message)):
            load(path, **factories(make_one_model()))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


class ReadsValues(LinearRouter):
    """Looks at a tensor while it is made, which `meta` tensors do not allow."""

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__(d_model, n_experts)
        self.values = torch.linspace(0, 1, 4).tolist()


def test_parts_that_look_at_values_can_be_loaded(make_one_model: MakeModel, save: Save) -> None:
    router = {"class_path": f"{__name__}.ReadsValues"}
    layer = FACTORIES["feed_forward"]
    parts = {"feed_forward": {**layer, "init_args": {**layer["init_args"], "router": router}}}
    model = make_one_model(
        feed_forward=partial(make_one_model().feed_forward, router=ReadsValues),
        attention=partial(make_one_model().attention, router=LinearRouter),
    )
    path = save(model, hyper_parameters={**FROM_COMMAND_LINE, **parts})
    assert_equal(load(path), model)


def test_parts_that_are_given_stay_whole(make_one_model: MakeModel, save: Save) -> None:
    shared = nn.RMSNorm(32)
    model = make_one_model(norm=lambda width: shared)
    path = save(model)
    assert_equal(load(path, **factories(model), norm=lambda width: shared), model)
    assert not shared.weight.is_meta


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": "much"}, "float.* Got value: much"),
        ({"feed_forward": {**LARGE, "init_args": {"width": 3}}}, "Option 'width' is not accepted"),
        ({"norm": {"class_path": "torch.nn.RMSNorm", "init_args": {"eps": "x"}}}, "eps.*value: x"),
    ],
)
def test_values_that_fit_no_model(changes: dict[str, Any], message: str, save: Save) -> None:
    path = save(hyper_parameters={**FROM_COMMAND_LINE, **changes})
    with pytest.raises(
        ValueError, match=f"^hyper-parameters that fit no DSMoE.*: .*{message}"
    ) as e:
        load(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("device", 99, "RuntimeError: .*accelerator"), ("dtype", 7, "TypeError: .*dtype")],
)
def test_a_norm_that_pytorch_does_not_make(
    option: str, value: int, message: str, save: Save
) -> None:
    norm = {"class_path": "torch.nn.RMSNorm", "init_args": {"eps": 1e-6, option: value}}
    path = save(hyper_parameters={**FROM_COMMAND_LINE, "norm": norm})
    with pytest.raises(ValueError, match=rf"^no DSMoELanguageModel can be built from .*{message}"):
        load(path)


def test_a_file_without_the_version_of_lightning(save: Save) -> None:
    path = save()
    checkpoint = torch.load(path)
    del checkpoint["pytorch-lightning_version"]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"can be built from .*: KeyError: .*lightning_version"):
        load(path)


@pytest.mark.parametrize("key", ["hyper_parameters", "hparams", "module_arguments"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": {"class_path": "os.system"}}, "'os.system' is not a known Attention"),
        ({"norm": {"class_path": "os.system"}}, "'os.system' is not a known Module"),
        ({"attention": {"class_path": "evil_parts.Evil"}}, "'evil_parts.Evil' is not a known"),
        ({"optimizer": {"class_path": "evil_parts.Evil"}}, "'evil_parts.Evil' is not a known"),
        ({"norm": "evil_parts.Evil"}, "norm needs a class_path"),
        ({"dropout": {"class_path": "evil_parts.Evil"}}, "'evil_parts.Evil' is not a known"),
        ({"_class_path": "evil_parts.Evil"}, "'evil_parts.Evil' is not a known"),
        ({"n_layers": 10**9}, "n_layers=1000000000 is out of range"),
    ],
)
def test_names_in_a_checkpoint_import_nothing(
    save: Save,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    (tmp_path / "evil_parts.py").write_text("raise SystemExit('this code ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    stored: dict[str, Any] = {"hyper_parameters": FROM_COMMAND_LINE}
    stored[key] = {**FROM_COMMAND_LINE, **changes}
    path = save(**stored)
    with pytest.raises(ValueError, match=message):
        load(path)
    assert "evil_parts" not in sys.modules


def test_code_runs_only_if_the_file_is_trusted(make_one_model: MakeModel, save: Save) -> None:
    path = save(code=Path)
    given = factories(make_one_model())
    for option in ({}, {"weights_only": None}, {"weights_only": True}):
        with pytest.raises(ValueError, match="holds more than data"):
            load(path, **given, **option)
    assert_equal(load(path, **given, weights_only=False), make_one_model())


def test_weights_that_a_strategy_has_loaded_already(make_one_model: MakeModel, save: Save) -> None:
    """FSDP takes them out of the checkpoint, or keeps them in files of their own."""
    checkpoint = torch.load(save())
    del checkpoint["state_dict"]
    make_one_model().on_load_checkpoint(checkpoint)


def test_another_model_is_refused_with_all_that_differs(
    make_one_model: MakeModel, save: Save
) -> None:
    path = save()
    given = factories(make_one_model())
    given["feed_forward"] = partial(given["feed_forward"], n_experts=3, d_shared=5)
    with pytest.raises(ValueError, match="of another model") as error:
        load(path, **given, tie_embeddings=False)
    for difference in (
        "tie_embeddings was True, is False",
        "feed_forward.n_experts was 4, is 3",
        "feed_forward.d_shared was 0, is 5",
    ):
        assert difference in str(error.value)


def test_other_weights_are_refused_with_all_that_differs(
    make_one_model: MakeModel, save: Save
) -> None:
    model = make_one_model()
    state = dict(model.state_dict())
    del state["decoder.norm.weight"]
    state["decoder.extra"] = torch.zeros(1)
    state["decoder.embedding.weight"] = torch.zeros(5, 32)
    path = save(state_dict=state)
    with pytest.raises(ValueError, match="another model's") as error:
        load(path, **factories(model), strict=False)
    for fault in (
        "missing decoder.norm.weight",
        "unknown decoder.extra",
        "decoder.embedding.weight is (5, 32), not (97, 32)",
    ):
        assert fault in str(error.value)


@pytest.mark.parametrize(
    ("version", "message"), [(2, "has format 2, this version reads 1"), (None, "no format_version")]
)
def test_other_formats_are_refused(save: Save, version: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(save(format_version=version))


class ForgetfulRouter(Router):
    """Does not keep its option."""

    def __init__(self, d_model: int, n_experts: int, *, scale: float = 1.0) -> None:
        super().__init__(d_model, n_experts)
        self.weight = nn.Parameter(scale * torch.ones(n_experts, d_model))

    def score(self, x: Tensor) -> Tensor:
        return x.float() @ self.weight.mT


def test_parts_that_cannot_be_described_do_not_keep_a_model_from_being_saved(
    make_one_model: MakeModel, save: Save
) -> None:
    parts = factories(make_one_model())
    parts["attention"] = partial(parts["attention"], router=ForgetfulRouter)
    model = make_one_model(**parts)
    with pytest.warns(UserWarning, match="ForgetfulRouter"):
        path = save(model)
    assert torch.load(path)["architecture"] is None
    with pytest.warns(UserWarning, match="ForgetfulRouter"):
        assert_equal(load(path, **parts), model)
