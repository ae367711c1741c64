"""What is not supported, or not what it should be, in the directory of a model."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_dsmoe.hugging_face import import_hf, plan_of
from lightning_dsmoe.serialization.tensor_files import read_header, stored_tensors

from ..small_models import save_model

EditConfig = Callable[[dict[str, Any]], None]

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Llama", {"model_type": "gemma2"}, "model_type='gemma2' is not supported; what is: llama, "),
    ("Llama", {"model_type": None}, "model_type=None is not supported"),
    ("Llama", {"architectures": ["LlamaForSequenceClassification"]}, "a language-model head"),
    ("Llama", {"quantization_config": {"bits": 4}}, "weights that are not quantized"),
    ("Llama", {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu' .* one of silu, swish, gelu"),
    ("Llama", {"hidden_size": 10**9}, "hidden_size must be an integer from 1 to 16777216"),
    ("Llama", {"num_hidden_layers": 10**6}, "num_hidden_layers must be an integer from 1 to 1024"),
    ("Llama", {"num_hidden_layers": "3"}, "num_hidden_layers must be an integer"),
    ("Llama", {"vocab_size": "absent"}, "vocab_size is missing"),
    ("Llama", {"num_key_value_heads": 4}, "num_key_value_heads=4 .* a divisor of num_att.*=6"),
    ("Llama", {"head_dim": 7}, "heads of odd width 7"),
    ("Llama", {"rms_norm_eps": -1.0}, "rms_norm_eps must be a finite number"),
    ("Llama", {"rope_parameters": [1]}, "rope_parameters=.1. .* one object for all layers"),
    (
        "Llama",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "one object for all layers",
    ),
    (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_parameters: rope_type='dynamic' .* default, linear, llama3 and yarn",
    ),
    (
        "Llama",
        {"rope_parameters": "absent", "rope_scaling": {"type": "longrope", "factor": 2.0}},
        "rope_scaling: type='longrope' .* default, linear, llama3 and yarn",
    ),
    ("Llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor is missing"),
    (
        "Llama",
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
        "llama3 rope scaling needs 0 < low_freq_factor",
    ),
    (
        "Llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7}},
        "mscale=0.7",
    ),
    (
        "Llama",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5",
    ),
    (
        "Mistral",
        {"sliding_window": 16},
        "sliding_window=16 .* full attention, which is the same up to 16",
    ),
    ("Mistral", {"sliding_window": "absent", "max_position_embeddings": 8192}, "window=4096"),
    ("Mixtral", {"sliding_window": 16}, "sliding_window=16"),
    # Whose classes do not read layer_types.
    ("Mixtral", {"sliding_window": 16, "layer_types": ["full_attention"] * 3}, "sliding_window=16"),
    (
        "Qwen3Moe",
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["full_attention"] * 3,
        },
        "sliding_window=16",
    ),
    ("Mistral", {"sliding_window": 4096, "max_position_embeddings": "absent"}, "window=4096"),
    ("Qwen2", {"layer_types": "sliding_attention"}, "layer_types='sliding_attention'"),
    ("Llama", {"is_causal": False}, "is_causal=False .* true"),
    ("Llama", {"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config=.* all layers"),
    (
        "Llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling=.* one of rope_parameters and rope_scaling",
    ),
    (
        "Llama",
        {
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0},
            "original_max_position_embeddings": 32,
        },
        "original_max_position_embeddings=32 .* in rope_parameters alone",
    ),
    ("Qwen3Moe", {"num_experts_per_tok": "absent", "top_k": 3}, "num_experts_per_tok is missing"),
    ("Mixtral", {"max_position_embeddings": "9"}, "max_position_embeddings must be an integer"),
    (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": "absent"},
        "sliding_window=16",
    ),
    ("Qwen2", {"layer_types": ["linear_attention"] * 3}, "full_attention in all layers"),
    ("Olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 .* not clipped"),
    ("Qwen3Moe", {"mlp_only_layers": [3]}, r"mlp_only_layers\[0\] must be an integer from 0 to 2"),
    ("Mixtral", {"num_experts_per_tok": 7}, "num_experts_per_tok must be .* from 1 to 6, got 7"),
    ("Mixtral", {"num_local_experts": 10**5}, "num_local_experts must be .* from 1 to 4096"),
    ("JetMoe", {"activation_function": "elu"}, "activation_function='elu' .* one of silu"),
    ("JetMoe", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05 .* 1e-6"),
    ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ("GPT2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    ("GPT2", {"n_head": 5}, "n_head=5 .* a divisor of n_embd=48"),
]


@pytest.mark.parametrize(("name", "fields", "message"), REFUSED)
def test_a_configuration_is_refused_by_name(
    name: str, fields: dict[str, Any], message: str, tmp_path: Path, edit_config: EditConfig
) -> None:
    save_model(tmp_path, name)
    edit_config(fields)
    with pytest.raises(ValueError, match=message):
        plan_of(tmp_path)
    with pytest.raises(ValueError, match=message):
        import_hf(tmp_path)


def test_all_problems_of_a_configuration_are_said_at_once(
    tmp_path: Path, edit_config: EditConfig
) -> None:
    save_model(tmp_path, "Olmoe")
    edit_config({"clip_qkv": 1.0, "hidden_act": "tanh", "vocab_size": 0})
    with pytest.raises(ValueError, match=r"clip_qkv.*vocab_size.*hidden_act") as error:
        import_hf(tmp_path)
    assert "\n" not in str(error.value)


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        import_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        import_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must be an object"):
        import_hf(tmp_path)


@pytest.mark.parametrize(
    ("n_experts", "message"),
    [
        (None, "llama is dense: give n_experts.* such as 8"),
        (7, "must divide the 24 neurons .* got 7; the nearest that does is 6"),
        (0, "got 0; the nearest that does is 1"),
    ],
)
def test_n_experts_of_a_dense_model(n_experts: int | None, message: str, tmp_path: Path) -> None:
    save_model(tmp_path, "Llama")
    with pytest.raises(ValueError, match=message):
        import_hf(tmp_path, n_experts=n_experts)


def test_a_configuration_of_a_far_larger_model(tmp_path: Path, edit_config: EditConfig) -> None:
    save_model(tmp_path, "Mixtral")
    edit_config({"num_local_experts": 4096, "num_hidden_layers": 1024})
    with pytest.raises(ValueError, match=r"asks for 4,\d+,\d+,\d+ weights or more, and the files"):
        import_hf(tmp_path)


def test_n_experts_of_a_mixture(tmp_path: Path) -> None:
    save_model(tmp_path, "Mixtral")
    with pytest.raises(ValueError, match="mixtral has 6 experts already"):
        import_hf(tmp_path, n_experts=6)


EXPERT = "model.layers.1.block_sparse_moe.experts.4.w2.weight"


@pytest.fixture
def mixtral(tmp_path: Path) -> Callable[[Callable[[dict[str, torch.Tensor]], object]], None]:
    """Saves a Mixtral whose tensors a function has changed."""
    save_model(tmp_path, "Mixtral")
    path = tmp_path / "model.safetensors"

    def change(edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
        stored = load_file(path)
        edit(stored)
        save_file(stored, path)

    return change


def test_tensors_that_do_not_match_are_all_named_as_on_disk(
    mixtral: Callable[[Any], None], tmp_path: Path
) -> None:
    def edit(stored: dict[str, torch.Tensor]) -> None:
        del stored[EXPERT]
        stored["model.layers.1.block_sparse_moe.experts.6.w2.weight"] = torch.zeros(48, 24)
        stored["model.norm.weight"] = torch.zeros(47)
        stored["lm_head.weight"] = torch.zeros(61, 48, dtype=torch.int8)

    mixtral(edit)
    with pytest.raises(ValueError, match="the tensors do not match") as error:
        import_hf(tmp_path)
    for fault in (
        f"missing {EXPERT};",
        "unknown model.layers.1.block_sparse_moe.experts.6.w2.weight",
        "model.norm.weight is (47,), not (48,)",
        "lm_head.weight is torch.int8",
    ):
        assert fault in str(error.value)


def test_a_missing_expert_of_the_stacked_layout(tmp_path: Path) -> None:
    save_model(tmp_path, "Qwen3Moe", save_original_format=False)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.2.mlp.experts.down_proj"
    save_file(stored | {name: stored[name][:5].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"down_proj is \(5, 48, 14\), not \(6, 48, 14\)") as error:
        import_hf(tmp_path)
    assert str(error.value).count(";") == 0


def test_values_that_are_not_finite(mixtral: Callable[[Any], None], tmp_path: Path) -> None:
    mixtral(lambda stored: stored[EXPERT].view(-1)[3].fill_(torch.nan))
    with pytest.raises(ValueError, match=r"experts\.4\.w2\.weight .*holds NaN or infinity"):
        import_hf(tmp_path)


def test_a_tied_head_may_be_there_twice(tmp_path: Path) -> None:
    save_model(tmp_path, "Llama", tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    head = stored["model.embed_tokens.weight"].clone()
    save_file(stored | {"lm_head.weight": head}, path)
    assert import_hf(tmp_path, n_experts=2).tie_embeddings
    save_file(stored | {"lm_head.weight": head + 1}, path)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embeddings"):
        import_hf(tmp_path, n_experts=2)


@pytest.mark.parametrize("file", ["../model-00001-of-00002.safetensors", "/etc/x.safetensors", 3])
def test_an_index_that_leads_out_of_its_folder(file: object, tmp_path: Path) -> None:
    save_model(tmp_path, "Mixtral", max_shard_size="100KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][EXPERT] = file
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names files that are no safetensors of its folder"):
        import_hf(tmp_path)


def test_an_index_that_does_not_match_its_shards(tmp_path: Path) -> None:
    save_model(tmp_path, "Mixtral", max_shard_size="100KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    moved = index["weight_map"].pop(EXPERT)
    index["weight_map"]["more.weight"] = moved
    index["weight_map"]["other.weight"] = "gone.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not in the index") as error:
        import_hf(tmp_path)
    assert "gone.safetensors: there is no such file" in str(error.value)
    assert f"more.weight is not in {moved}" in str(error.value)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', "{"])
def test_an_index_that_is_none(index: str, tmp_path: Path) -> None:
    save_model(tmp_path, "Mixtral", max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"is not (an index|JSON)"):
        import_hf(tmp_path)


def test_shards_without_an_index(tmp_path: Path) -> None:
    save_model(tmp_path, "Mixtral", max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"without model\.safetensors\.index\.json"):
        import_hf(tmp_path)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("was_run"),)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_not_read(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path, "Mixtral")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_bytes(pickle.dumps(Malicious()))
    with pytest.raises((ValueError, FileNotFoundError), match=r"pickle can run code|is a pickle"):
        import_hf(tmp_path)
    torch.save({"x": torch.zeros(3)}, tmp_path / file)
    with pytest.raises((ValueError, FileNotFoundError), match=r"pickle can run code|is a pickle"):
        import_hf(tmp_path)
    assert not Path("was_run").exists()


def header(**fields: Any) -> bytes:
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header ends beyond the file"),
        (struct.pack("<Q", 2**40), "header ends beyond the file"),
        (struct.pack("<Q", 4) + b"{{{{", "not a safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "its header is no object"),
        (header(x=F32), "its tensors end at byte .*, the file at"),
        (header(x=F32) + bytes(9), "its tensors end at byte"),
        (header(x=F32 | {"shape": [2**40]}) + bytes(8), "does not take 8 bytes"),
        (header(x=F32 | {"shape": [-2]}) + bytes(8), "must be an integer from 0"),
        (header(x=F32 | {"dtype": "F4"}) + bytes(8), "'x' is 'F4', allowed are F64, F32"),
        (header(x=F32, y=F32) + bytes(8), "do not follow one another"),
        (header(x=F32 | {"data_offsets": [8, 16]}) + bytes(16), "do not follow one another"),
        (header(x={"dtype": "F32"}) + bytes(8), "must have the fields dtype, shape"),
    ],
)
def test_a_file_that_is_not_whole(content: bytes, message: str, tmp_path: Path) -> None:
    save_model(tmp_path, "Mixtral")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        import_hf(tmp_path)


def test_a_header_whose_size_looks_like_a_pickle(tmp_path: Path) -> None:
    text = json.dumps({"x": F32}).encode().ljust(0x280)
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<2f", 1, 2))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert read_header(path)["x"].read().tolist() == [1, 2]


def test_where_there_are_no_weights_one_line_says_so(tmp_path: Path) -> None:
    message = f"^no model.safetensors in {tmp_path}, and no other weights$"
    with pytest.raises(FileNotFoundError, match=message):
        stored_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^there is no directory {tmp_path / 'nowhere'}$"):
        stored_tensors(tmp_path / "nowhere")
