"""Upcycled models of transformers, with transformers' own modules as judge."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lightning_dsmoe import (
    MixtureOfExperts,
    SelectionPlan,
    TopK,
    routed_layers,
    run_plan,
    upcycle,
)
from lightning_dsmoe.upcycling import load_upcycled, save_upcycled
from lightning_dsmoe.upcycling.source import load_source

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 100,  # 6 experts do not divide it
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 128}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LLAMA3, "mlp_bias": True}),
    "llama_mha_tied": ("Llama", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 8}),
    "smollm3": ("SmolLM3", {}),
    "phi3": ("Phi3", {}),
    "gpt2": ("GPT2", GPT2),
}


def make(name: str) -> Any:
    family, options = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**SMALL | options)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    return getattr(transformers, f"{family}{head}")(config).eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 97, (2, 33))


@torch.no_grad()
def gap(model: Any, other: Any, tokens: Tensor) -> float:
    one, two = model(tokens).logits, other(tokens).logits
    return float((one - two).abs().max() / two.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_all_experts_are_the_dense_model(name: str, tokens: Tensor, tmp_path: Path) -> None:
    """In memory and after a round trip through several files: logits and greedy text."""
    model = make(name)
    dense = copy.deepcopy(model)
    names = upcycle(model, 6)
    assert len(names) == 2
    assert list(routed_layers(model)) == names
    save_upcycled(model, tmp_path / "up", max_shard_bytes=50_000)
    loaded = load_upcycled(tmp_path / "up")
    assert len(list((tmp_path / "up").rglob("*.safetensors"))) > 1
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    for name_, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name_])
    for each in (model, loaded):
        assert gap(each, dense, tokens) < 1e-5
    greedy = {"max_new_tokens": 64, "do_sample": False}
    texts = [each.generate(tokens[:, :4], **greedy) for each in (dense, loaded)]
    assert torch.equal(*texts)
    with run_plan(loaded, SelectionPlan(experts=TopK(2))):
        assert gap(loaded, dense, tokens) > 1e-4


def test_mixtures_are_refused() -> None:
    config = transformers.MixtralConfig(**SMALL, num_local_experts=2)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp \(MixtralSparseMoeBlock\).*layers\.1"):
        upcycle(transformers.MixtralForCausalLM(config), 4)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = make("llama")
    upcycle(model, 6)
    save_upcycled(model, tmp_path / "up")
    return tmp_path / "up"


def edited(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        data = json.loads((path / "upcycling.json").read_text())
        change(data)
        (path / "upcycling.json").write_text(json.dumps(data))

    return edit


def configured(**fields: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        config = json.loads((path / "config.json").read_text()) | fields
        (path / "config.json").write_text(json.dumps(config))

    return edit


LAYER, SHARD = "model.layers.0.mlp", "weights/model.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edited(lambda d: d.update(format_version=2)), "format 2"),
        (edited(lambda d: d.update(more=1)), "unknown"),
        (edited(lambda d: d["layers"].pop(LAYER)), "unknown model.layers.0.mlp.layer"),
        (edited(lambda d: d["layers"].update({"": d["layers"][LAYER]})), "no module ''"),
        (configured(attn_implementation="some/kernel"), "asks for code of the Hub, 'some/kernel'"),
        (configured(hidden_size=6 * 2**30), "not \\("),
        (configured(hidden_size=49), "makes no causal model: .*49.* not a multiple"),
        (configured(num_hidden_layers=10**9), "layers are allowed, got 1000000000"),
        (edited(lambda d: d["layers"].update(a=d["layers"][LAYER])), "no module 'a'"),
        (edited(lambda d: d["layers"][LAYER].update(d_model=2**40)), "d_model must be"),
        (
            edited(lambda d: d["layers"][LAYER]["mixture"]["init_args"].update(n_experts=5)),
            r"router.weight is \(6, 48\), not \(5, 48\)",
        ),
        (
            edited(lambda d: d["layers"][LAYER]["mixture"].update(class_path="os.system")),
            "not a known",
        ),
        (
            lambda path: (path / "weights/model.safetensors").write_bytes(b"\x80\x02}q\x00."),
            "pickle",
        ),
    ],
)
def test_damaged_directories_are_refused(
    saved: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(saved)
    with pytest.raises(ValueError, match=message):
        load_upcycled(saved)


def test_from_pretrained_refuses_the_directory(saved: Path) -> None:
    """Rather than make random dense layers; configuration and tokenizer are read as ever."""
    for cls in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            cls.from_pretrained(saved)
    assert transformers.AutoConfig.from_pretrained(saved).model_type == "llama"


def test_where_generation_stops_is_kept(tmp_path: Path) -> None:
    model = make("llama")
    model.generation_config.eos_token_id = [5, 7]
    upcycle(model, 6)
    save_upcycled(model, tmp_path / "up")
    assert load_upcycled(tmp_path / "up").generation_config.eos_token_id == [5, 7]
    (tmp_path / "up/generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config\.json is not one"):
        load_upcycled(tmp_path / "up")


def test_files_of_others_are_not_deleted(saved: Path) -> None:
    (saved / "logs").mkdir()
    (saved / "logs/notes.txt").write_text("mine")
    (saved / "weights/model-00001-of-00002.safetensors").write_text("of an earlier model")
    save_upcycled(load_upcycled(saved), saved)
    assert (saved / "logs/notes.txt").read_text() == "mine"
    assert [path.name for path in (saved / "weights").iterdir()] == ["model.safetensors"]


def test_mixtures_that_could_not_be_made_again_are_refused(tmp_path: Path) -> None:
    model = make("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    upcycle(model, 6)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp is in two places"):
        save_upcycled(model, tmp_path / "up")
    model = make("llama")
    upcycle(model, 6)
    model.extra = MixtureOfExperts(48, 2, 3)
    with pytest.raises(ValueError, match=r"extra is no layer that `upcycle` made"):
        save_upcycled(model, tmp_path / "up")
    assert not (tmp_path / "up").exists()


def test_layers_in_lists_are_written(tmp_path: Path) -> None:
    """Whose names end with a number, as those inside a layer with dropout do."""
    model = make("llama")
    model.mlps = torch.nn.ModuleList([copy.deepcopy(model.model.layers[0].mlp)])
    upcycle(model, 6)
    save_upcycled(model, tmp_path / "up")
    described = json.loads((tmp_path / "up/upcycling.json").read_text())
    assert "mlps.0" in described["layers"]


@pytest.mark.parametrize(
    "fields",
    [
        {"_attn_implementation": "some/kernel"},
        {"text_config": {"attn_implementation": {"": "sdpa", "inner": "some/kernel"}}},
    ],
)
def test_kernels_of_the_hub_are_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    configured(**fields)(tmp_path)
    with pytest.raises(ValueError, match="only with trust_remote_code"):
        load_source(tmp_path)


def test_tensors_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    """Such as biases that the configuration denies."""
    make("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"mlp_bias": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unknown model\.layers\.0\.mlp\.down_proj\.bias"):
        load_source(tmp_path)


def test_only_upcycled_models_are_replaced(saved: Path, tmp_path: Path) -> None:
    model = make("llama")
    with pytest.raises(ValueError, match="no model of transformers with upcycled layers"):
        save_upcycled(model, tmp_path / "new")
    upcycle(model, 3)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no upcycled model"):
        save_upcycled(model, other)
    assert [path.name for path in other.iterdir()] == ["mine.txt"]
    save_upcycled(model, saved)
    assert next(iter(routed_layers(load_upcycled(saved)).values())).n_experts == 3
    with pytest.raises(FileNotFoundError, match=r"no upcycling\.json"):
        load_upcycled(other)
