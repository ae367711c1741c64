"""Dense and sparse runs of whole decoders."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lightning_dsmoe.attention import GroupedQueryAttention
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import FeedForward, MixtureOfExperts
from lightning_dsmoe.routing import Selection, SelectionPlan, Threshold, TopK


def plan_of(decoder: Decoder, make: Callable[[int], Selection]) -> SelectionPlan:
    experts, attention = decoder.plan_sizes
    return SelectionPlan.of_blocks(
        tuple(make(n) for n in experts if n), tuple(make(n) for n in attention if n)
    )


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("make", [TopK, lambda n: Threshold(0.0)], ids=["top k", "threshold"])
def test_full_plan_equals_dense(
    decoder: Decoder, make: Callable[[int], Selection], batches: list[Tensor]
) -> None:
    dense = decoder(batches[0])
    sparse = decoder(batches[0], plan_of(decoder, make))
    scale = dense.logits.abs().max()
    assert (sparse.logits - dense.logits).abs().max() <= 2e-6 * scale.clamp_min(1)


def test_plan_of_all_experts_is_the_default(decoder: Decoder, batches: list[Tensor]) -> None:
    plan = SelectionPlan()
    assert torch.equal(decoder(batches[0], plan).logits, decoder(batches[0]).logits)


def test_each_layer_follows_its_own_selection(decoder: Decoder, batches: list[Tensor]) -> None:
    dense = decoder(batches[0]).routings
    last_attention = f"blocks.{decoder.n_layers - 1}.attention"
    sparse = decoder(batches[0], SelectionPlan(layers={last_attention: TopK(1)})).routings
    for layer in range(decoder.n_layers):
        last = layer == decoder.n_layers - 1
        for kind in ("experts", "attention"):
            same = torch.equal(
                getattr(dense, kind)[layer].logits, getattr(sparse, kind)[layer].logits
            )
            assert same == (not last or kind == "attention")


def test_routings_have_one_entry_a_layer(decoder: Decoder, batches: list[Tensor]) -> None:
    logits, routings = decoder(batches[0])
    assert logits.shape == (3, 16, decoder.vocab_size)
    for found, sizes in zip(routings, decoder.plan_sizes, strict=True):
        assert [routing.probs.shape for routing in found if routing] == [(3, 16, n) for n in sizes]


def test_layers_without_a_router_have_no_routing() -> None:
    decoder = Decoder(
        11,
        8,
        2,
        attention=partial(GroupedQueryAttention, n_heads=2, n_kv_heads=1, d_head=4),
        feed_forward=partial(FeedForward, d_hidden=6),
        norm=nn.LayerNorm,
    )
    tokens = torch.randint(11, (2, 5))
    assert decoder(tokens).routings == ((None, None), (None, None))
    assert decoder.plan_sizes == ([None, None], [None, None])
    plan = SelectionPlan(experts=TopK(3), attention=TopK(3))
    assert torch.equal(decoder(tokens, plan).logits, decoder(tokens).logits)


def test_each_layer_has_the_factory_of_its_place() -> None:
    attention = [
        partial(GroupedQueryAttention, n_heads=4, n_kv_heads=n, d_head=4, rope_theta=theta)
        for n, theta in ((1, 100.0), (2, None), (4, 100.0))
    ]
    mixture = partial(MixtureOfExperts, n_experts=5, d_expert=6)
    dense = partial(FeedForward, d_hidden=10)
    decoder = Decoder(11, 8, 3, attention=attention, feed_forward=(dense, mixture, mixture))
    assert [block.attention.n_kv_heads for block in decoder.blocks] == [1, 2, 4]
    assert [block.attention.rope_theta for block in decoder.blocks] == [100.0, None, 100.0]
    assert decoder.plan_sizes == ([None, 5, 5], [None, None, None])
    tokens = torch.randint(11, (2, 7))
    expected = decoder(tokens).logits
    caches = decoder.new_caches(2, 7)
    assert [cache.keys.shape[1] for cache in caches] == [1, 2, 4]
    pieces = [decoder(part, caches=caches).logits for part in tokens.split(3, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["attention", "feed_forward"])
def test_a_list_of_another_length_is_refused(kind: str) -> None:
    parts = {
        "attention": partial(GroupedQueryAttention, n_heads=2, n_kv_heads=1, d_head=4),
        "feed_forward": partial(FeedForward, d_hidden=6),
    }
    message = f"^{kind} must be one for all layers or one for each, got 2 for 3$"
    with pytest.raises(ValueError, match=message):
        Decoder(11, 8, 3, **{**parts, kind: [parts[kind]] * 2})


@pytest.mark.parametrize("plan", [None, SelectionPlan(experts=TopK(1))], ids=str)
def test_later_tokens_never_change_earlier_ones(
    decoder: Decoder, plan: SelectionPlan | None, batches: list[Tensor]
) -> None:
    if plan:
        plan = SelectionPlan(experts=TopK(1), attention=TopK(1))
    tokens = batches[0].clone()
    before = decoder(tokens, plan).logits
    tokens[:, 9:] = tokens[:, 9:].flip(1)
    after = decoder(tokens, plan).logits
    torch.testing.assert_close(after[:, :9], before[:, :9], rtol=0, atol=1e-6)
    assert not torch.allclose(after[:, 9:], before[:, 9:], atol=1e-3)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_empty_and_single_tokens(decoder: Decoder, shape: tuple[int, int], sparse: bool) -> None:
    plan = SelectionPlan(experts=TopK(2), attention=Threshold(1.0))
    logits = decoder(torch.randint(97, shape), plan if sparse else None).logits
    assert logits.shape == (*shape, decoder.vocab_size)
    assert logits.isfinite().all()


def test_plan_of_another_depth_is_refused(decoder: Decoder, batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"no routed layer 'blocks\.6\.attention'; the nearest"):
        decoder(batches[0], SelectionPlan(layers={"blocks.6.attention": TopK(1)}))


def test_plan_with_too_many_experts_is_refused(decoder: Decoder, batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"TopK\(k=6\) needs k <= "):
        decoder(batches[0], SelectionPlan(experts=TopK(6)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_positions": 0}, "must be at least 1, got .* and 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "got -0.1"),
    ],
)
def test_options_out_of_range_are_refused(
    make_decoder: Callable[..., Decoder], options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_decoder(**options)
