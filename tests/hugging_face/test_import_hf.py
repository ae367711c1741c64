import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_dsmoe import (
    AllExperts,
    FeedForward,
    GroupedQueryAttention,
    MixtureOfAttentionHeads,
    SelectionPlan,
    SwitchPoints,
    TopK,
    compile_sparse,
)
from lightning_dsmoe.hugging_face import import_hf, plan_of
from lightning_dsmoe.hugging_face.weight_map import entries

from ..small_models import DENSE, MIXTURES, OPTIONS, save_model

EXACT = [name for name in MIXTURES if not name.startswith("Granite")]


def n_experts_of(name: str) -> int | None:
    return 8 if name in DENSE else None


def difference(model: nn.Module, folder: Path, n_experts: int | None) -> float:
    """Largest difference of the logits, over the largest logit."""
    torch.manual_seed(1)
    tokens = torch.randint(61, (2, 33))
    decoder = import_hf(folder, n_experts=n_experts)
    with torch.no_grad():
        theirs = model(tokens).logits
        ours = decoder(tokens, plan_of(folder)).logits
    return float((theirs - ours).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_and_greedy_text_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, name)
    assert difference(model, tmp_path, n_experts_of(name)) < 1e-5
    decoder = import_hf(tmp_path, n_experts=n_experts_of(name))
    runner = compile_sparse(decoder, plan_of(tmp_path), switch_points=SwitchPoints(gather_up_to=0))
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    theirs = model.generate(prompt, max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert torch.equal(runner.generate(prompt, 64, temperature=0), theirs)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_stacked_layout_gives_the_same_decoder(name: str, tmp_path: Path) -> None:
    save_model(tmp_path / "original", name)
    save_model(tmp_path / "stacked", name, save_original_format=False)
    ours = import_hf(tmp_path / "original").state_dict()
    same = import_hf(tmp_path / "stacked").state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("k", [1, 6])
@pytest.mark.parametrize("name", MIXTURES)
def test_any_number_of_experts_may_run(name: str, k: int, tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": k == 6}
    model = save_model(tmp_path, name, num_experts_per_tok=k, **tied)
    assert difference(model, tmp_path, None) < 1e-5
    assert plan_of(tmp_path).experts == TopK(k, renormalize=name in MIXTURES[3:])


@pytest.mark.parametrize("name", ["Olmoe", "Qwen2Moe", "Qwen3Moe"])
def test_renormalized_gates_are_of_the_plan(name: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, name, norm_topk_prob=True)
    assert plan_of(tmp_path) == SelectionPlan(TopK(2, renormalize=True))
    assert difference(model, tmp_path, None) < 1e-5
    raw = import_hf(tmp_path)(torch.arange(9)[None], SelectionPlan(TopK(2))).logits
    with torch.no_grad():
        assert not torch.allclose(model(torch.arange(9)[None]).logits, raw, rtol=0.01)


@pytest.mark.parametrize("name", EXACT)
def test_every_tensor_of_a_mixture_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    save_model(tmp_path, name)
    decoder = import_hf(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    state = decoder.state_dict()
    family = json.loads((tmp_path / "config.json").read_text())["model_type"]
    back = {
        theirs: tensor
        for entry in entries(family, decoder)
        for theirs, tensor in zip(entry.theirs, entry.to_theirs(state[entry.ours]), strict=True)
    }
    assert back.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in back.items())


def test_bfloat16_stays_as_it_is(tmp_path: Path) -> None:
    model = save_model(tmp_path, "Mixtral").bfloat16()
    model.save_pretrained(tmp_path)
    decoder = import_hf(tmp_path)
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    assert torch.equal(decoder.embedding.weight, model.model.embed_tokens.weight)
    wide = import_hf(tmp_path, dtype=torch.float32)
    assert torch.equal(wide.embedding.weight, model.model.embed_tokens.weight.float())


def test_types_that_differ_are_held_exactly(tmp_path: Path) -> None:
    save_model(tmp_path, "Mixtral")
    stored = load_file(tmp_path / "model.safetensors")
    first, second = (f"model.layers.0.block_sparse_moe.experts.{n}.w1.weight" for n in (0, 1))
    stored[first] = stored[first].bfloat16()
    save_file(stored, tmp_path / "model.safetensors")
    w_in = import_hf(tmp_path).blocks[0].feed_forward.experts.w_in.weight
    assert torch.equal(w_in[0, :24], stored[first].float())
    assert torch.equal(w_in[1, :24], stored[second])


@pytest.mark.parametrize("n_experts", [1, 3, 21])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_model_is_split(
    n_experts: int, n_kv_heads: int, tied: bool, tmp_path: Path
) -> None:
    sizes = {"intermediate_size": 21, "num_key_value_heads": n_kv_heads}
    model = save_model(tmp_path, "Llama", tie_word_embeddings=tied, **sizes)
    assert difference(model, tmp_path, n_experts) < 1e-5
    block = import_hf(tmp_path, n_experts=n_experts).blocks[0]
    kind = GroupedQueryAttention if n_kv_heads == 6 else MixtureOfAttentionHeads
    assert isinstance(block.attention, kind)
    assert not block.feed_forward.router.weight.any()
    assert block.feed_forward.gate_scale == "mean_one"


@pytest.mark.parametrize("name", ["Llama", "Olmoe", "Qwen3", "GraniteMoe"])
def test_biases_of_all_projections(name: str, tmp_path: Path) -> None:
    more = {"mlp_bias": True} if name == "Llama" else {}
    model = save_model(tmp_path, name, attention_bias=True, **more)
    assert difference(model, tmp_path, n_experts_of(name)) < 1e-5


@pytest.mark.parametrize("name", ["GraniteMoe", "GraniteMoeShared"])
@pytest.mark.parametrize("tied", [False, True])
def test_multipliers_are_folded(name: str, tied: bool, tmp_path: Path) -> None:
    model = save_model(tmp_path, name, tie_word_embeddings=tied)
    assert import_hf(tmp_path).tie_embeddings == tied
    assert difference(model, tmp_path, None) < 1e-5


def test_neutral_multipliers_change_no_bit(tmp_path: Path) -> None:
    neutral = {f"{name}_multiplier": 1.0 for name in ("embedding", "residual")}
    heads = {"num_attention_heads": 6, "attention_multiplier": 8**-0.5}
    save_model(tmp_path, "GraniteMoe", logits_scaling=1.0, **neutral, **heads)
    stored = load_file(tmp_path / "model.safetensors")
    block = import_hf(tmp_path).blocks[0]
    theirs = stored["model.layers.0.self_attn.q_proj.weight"].view(2, 3, 8, 48).transpose(0, 1)
    assert torch.equal(block.attention.heads.w_q.weight.view(3, 2, 8, 48), theirs)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotary_positions_in_both_forms(
    rope: dict[str, Any], tmp_path: Path, edit_config: Callable[[dict[str, Any]], None]
) -> None:
    model = save_model(tmp_path, "Llama", rope_parameters={"rope_theta": 5000.0, **rope})
    assert difference(model, tmp_path, 8) < 1e-5
    before = {"type" if rope["rope_type"] == "linear" else "rope_type": rope["rope_type"]}
    before |= {name: value for name, value in rope.items() if name != "rope_type"}
    edit_config(
        {
            "rope_parameters": "absent",
            "dtype": "absent",
            "torch_dtype": "float32",
            "rope_theta": 5000.0,
            "rope_scaling": before,
        }
    )
    assert difference(model, tmp_path, 8) < 1e-5
    edit_config({"rope_scaling": None})
    assert difference(model, tmp_path, 8) > 1e-3


@pytest.mark.parametrize("options", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}])
@pytest.mark.parametrize("name", ["Qwen2Moe", "Qwen3Moe"])
def test_layers_that_differ(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = save_model(tmp_path, name, **options)
    assert difference(model, tmp_path, None) < 1e-5
    assert isinstance(import_hf(tmp_path).blocks[0].feed_forward, FeedForward)


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path) -> None:
    model = save_model(tmp_path, "Mistral", sliding_window=128)
    assert difference(model, tmp_path, 4) < 1e-5


def test_gpt2_as_it_was_first_saved(tmp_path: Path) -> None:
    model = save_model(tmp_path, "GPT2")
    stored = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    save_file(bare, tmp_path / "model.safetensors")
    assert difference(model, tmp_path, 4) < 1e-5


def test_a_dense_model_runs_all_experts(tmp_path: Path) -> None:
    save_model(tmp_path, "Llama")
    assert plan_of(tmp_path) == SelectionPlan(AllExperts(), AllExperts())


def test_shards(tmp_path: Path) -> None:
    model = save_model(tmp_path, "Qwen3Moe", max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert difference(model, tmp_path, None) < 1e-5


def test_swapped_gate_and_up_are_another_model(tmp_path: Path) -> None:
    model = save_model(tmp_path, "Mixtral")
    stored = load_file(tmp_path / "model.safetensors")
    expert = "model.layers.0.block_sparse_moe.experts.5"
    first, second = (stored[f"{expert}.{name}.weight"] for name in ("w1", "w3"))
    swapped = {f"{expert}.w1.weight": second, f"{expert}.w3.weight": first}
    save_file(stored | swapped, tmp_path / "model.safetensors")
    assert difference(model, tmp_path, None) > 1e-4


@pytest.mark.parametrize(
    ("name", "split"), [("Qwen3", "weights"), ("GPT2", "weights"), ("Qwen3", "activations")]
)
def test_neurons_are_split_otherwise(name: str, split: Any, tmp_path: Path) -> None:
    model = save_model(tmp_path, name)
    sample = torch.randint(61, (4, 50)) if split == "activations" else None
    decoder = import_hf(tmp_path, n_experts=4, split=split, tokens=sample)
    plain = import_hf(tmp_path, n_experts=4)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        theirs = model(tokens).logits
        assert float((decoder(tokens).logits - theirs).abs().max() / theirs.abs().max()) < 1e-5
    moved = 0
    for block, before in zip(decoder.blocks, plain.blocks, strict=True):
        w_out, w_before = (b.feed_forward.experts.w_out.weight for b in (block, before))
        moved += not torch.equal(w_out, w_before)
        sums, sums_before = (w.flatten(0, 1).sum(1).sort()[0] for w in (w_out, w_before))
        assert torch.equal(sums, sums_before)
    assert moved


def test_options_of_the_split(tmp_path: Path) -> None:
    save_model(tmp_path, "Llama")
    with pytest.raises(ValueError, match="split must be one of"):
        import_hf(tmp_path, n_experts=4, split="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the tokens"):
        import_hf(tmp_path, n_experts=4, split="activations")
    save_model(tmp_path, "Mixtral")
    with pytest.raises(ValueError, match="mixtral has experts already"):
        import_hf(tmp_path, split="weights")


def test_progress_counts_up_to_all(tmp_path: Path) -> None:
    save_model(tmp_path, "Mixtral")
    seen: list[tuple[int, int]] = []
    import_hf(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == len(seen)
