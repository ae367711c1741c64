from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dsmoe import (
    Decoder,
    FeedForward,
    GroupedQueryAttention,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
    SelectionPlan,
    Threshold,
    TopK,
)
from lightning_dsmoe.attention import Llama3RopeScaling
from lightning_dsmoe.hugging_face import export_hf, import_hf, plan_of
from lightning_dsmoe.serialization.architecture import describe_decoder
from lightning_dsmoe.serialization.pruning import Remaining, prune

HEADS = partial(
    MixtureOfAttentionHeads,
    n_experts=3,
    n_heads=1,
    d_head=4,
    rope_scaling=Llama3RopeScaling(4.0, 1.0, 4.0, original_max_positions=16),
)
PLAIN = partial(GroupedQueryAttention, n_heads=4, n_kv_heads=2, d_head=6, rotary_fraction=0.7)
EXPERTS = partial(MixtureOfExperts, n_experts=4, d_expert=6, d_shared=3)
PLAN = SelectionPlan(Threshold(0.8), TopK(2), {"blocks.1.feed_forward": TopK(1, renormalize=True)})


def small_decoder(*, tied: bool) -> Decoder:
    attention, feed_forward = (
        [HEADS, PLAIN, HEADS],
        [EXPERTS, EXPERTS, partial(FeedForward, d_hidden=5)],
    )
    return Decoder(
        31, 12, 3, attention=attention, feed_forward=feed_forward, tie_embeddings=tied
    ).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pruned", [True, False])
def test_an_exported_decoder_comes_back_to_the_bit(
    tied: bool, pruned: bool, tmp_path: Path
) -> None:
    decoder = small_decoder(tied=tied)
    if pruned:
        decoder = prune(decoder, Remaining(((0, 2), None, None), (None, None, (1,))))
    assert export_hf(decoder, tmp_path, plan=PLAN) == "dsmoe"
    back = import_hf(tmp_path)
    assert describe_decoder(back) == describe_decoder(decoder)
    assert plan_of(tmp_path) == PLAN
    state, before = back.state_dict(), decoder.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    assert (back.head.weight is back.embedding.weight) == tied
    tokens = torch.arange(20)[None]
    assert torch.equal(back(tokens, PLAN).logits, decoder(tokens, PLAN).logits)


def test_an_edited_configuration_is_refused(
    tmp_path: Path, edit_config: Callable[[dict[str, Any]], None]
) -> None:
    export_hf(small_decoder(tied=True), tmp_path, plan=PLAN)
    with pytest.raises(ValueError, match="n_experts is for dense models of transformers; got n_"):
        import_hf(tmp_path, n_experts=2)
    edit_config({"rotations": [], "tie_word_embeddings": False})
    with pytest.raises(ValueError, match=r"tie_word_emb.* is not that .*rotations is not that"):
        plan_of(tmp_path)
    edit_config({"lightning_dsmoe": "absent"})
    with pytest.raises(ValueError, match="lightning_dsmoe"):
        import_hf(tmp_path)
