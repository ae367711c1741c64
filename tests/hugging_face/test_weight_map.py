import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dsmoe import Decoder, GroupedQueryAttention
from lightning_dsmoe.hugging_face.config_file import ConfigFile
from lightning_dsmoe.hugging_face.families.gpt2 import read as read_gpt2
from lightning_dsmoe.hugging_face.source_model import build
from lightning_dsmoe.hugging_face.weight_entries import dense_glu, glu_experts
from lightning_dsmoe.hugging_face.weight_map import FAMILIES, Layout, entries

GPT2 = {"vocab_size": 11, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_inner": 10}
CONFIG = {
    "vocab_size": 11,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 10,
    "moe_intermediate_size": 5,
    "shared_expert_intermediate_size": 3,
    "shared_intermediate_size": 3,
    "sliding_window": None,
    "attention_bias": True,
    "mlp_bias": True,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "kv_channels": 4,
}


def random_decoder(family: str) -> Decoder:
    fields = {"model_type": family, **(GPT2 if family == "gpt2" else CONFIG)}
    config = ConfigFile(fields, "config.json")
    source = FAMILIES[family].read(config)
    config.finish()
    decoder = build(source, None if source.mixture else 5).to_empty(device="cpu")
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    return decoder


@pytest.mark.parametrize("layout", ["original", "stacked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_of_every_tensor_is_bit_equal(family: str, layout: Layout) -> None:
    decoder = random_decoder(family)
    state = decoder.state_dict()
    found = entries(family, decoder, layout)
    theirs = [name for entry in found for name in entry.theirs]
    assert len(theirs) == len(set(theirs))
    for entry in found:
        tensors = entry.to_theirs(state[entry.ours])
        assert len(tensors) == len(entry.theirs)
        assert all(tensor.is_contiguous() for tensor in tensors)
        assert torch.equal(entry.to_ours(tensors), state[entry.ours])
        shapes = [each.shape for each in entry.to_theirs(state[entry.ours].to("meta"))]
        assert shapes == [each.shape for each in tensors]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_but_routers_of_dense_models_has_an_entry(family: str) -> None:
    decoder = random_decoder(family)
    rest = decoder.state_dict().keys() - {entry.ours for entry in entries(family, decoder)}
    rest -= {"head.weight"} if decoder.tie_embeddings else set()
    if family in ("llama", "mistral", "qwen2", "qwen3", "gpt2"):
        rest = {name for name in rest if not name.endswith("router.weight")}
    if family == "jetmoe":  # whose experts have an output bias alone
        rest = {name for name in rest if not name.endswith("experts.b_in")}
    assert not rest


def test_a_query_head_is_found_by_its_kv_head() -> None:
    decoder = random_decoder("llama")
    (entry,) = (
        e for e in entries("llama", decoder) if e.ours == "blocks.0.attention.heads.w_q.weight"
    )
    theirs = entry.to_theirs(decoder.blocks[0].attention.heads.w_q.weight)[0].view(6, 4, 12)
    ours = decoder.blocks[0].attention.heads.w_q.weight.view(3, 2, 4, 12)  # groups, KV heads
    for head in range(6):
        assert torch.equal(theirs[head], ours[head % 3, head // 3])


def test_multi_head_attention_of_gpt2_is_no_mixture() -> None:
    source = read_gpt2(ConfigFile({"model_type": "gpt2", **GPT2}, "config.json"))
    assert isinstance(build(source, 2).blocks[0].attention, GroupedQueryAttention)


def test_a_family_that_is_not_known() -> None:
    with pytest.raises(ValueError, match=r"family must be one of llama, .* got 'gemma'"):
        entries("gemma", random_decoder("llama"))


class Reading(Sequence[Tensor]):
    """Matrices that are made when they are asked for, one at a time."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.made: list[weakref.ref[Tensor]] = []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, number: Any) -> Any:
        if number >= self.n:
            raise IndexError
        assert not any(made() is not None for made in self.made)
        matrix = torch.full((4, 3), float(number))
        self.made.append(weakref.ref(matrix))
        return matrix


def test_experts_are_let_go_before_the_next_is_read() -> None:
    w_in, w_out = glu_experts([(f"g{n}", f"u{n}", f"d{n}") for n in range(3)], "ours.")
    assert w_in.to_ours(Reading(6)).mean((1, 2)).tolist() == [0.5, 2.5, 4.5]
    assert w_out.to_ours(Reading(3)).shape == (3, 3, 4)
    dense = dense_glu("g.", "u.", "d.", "ours.", n_experts=2)[0]
    assert dense.to_ours(Reading(2))[:, :, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
