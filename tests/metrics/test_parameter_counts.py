from functools import partial

from torch import nn

from lightning_dsmoe.attention import MixtureOfAttentionHeads
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import GLUExperts, MixtureOfExperts
from lightning_dsmoe.inference import Remaining, prune
from lightning_dsmoe.metrics import ParameterCounts, RoutedParameters, count_parameters

D = 8


def test_hand_count_of_a_small_model(small_decoder: Decoder) -> None:
    layer = 2 * 32 + 2 * 4 * 32 + 32 * 2 * 8  # norms, routers, keys and values
    assert count_parameters(small_decoder) == ParameterCounts(
        outside=97 * 32,
        always=2 * layer + 32,
        experts=(RoutedParameters(4, 3 * 24 * 32),) * 2,
        attention=(RoutedParameters(4, 2 * 8 * 32),) * 2,
    )


def test_biases_shared_expert_positions_and_untied_head() -> None:
    decoder = Decoder(
        10,
        D,
        1,
        attention=partial(MixtureOfAttentionHeads, n_experts=3, n_heads=2, d_head=4, bias=True),
        feed_forward=partial(
            MixtureOfExperts,
            n_experts=5,
            d_expert=6,
            d_shared=7,
            experts=partial(GLUExperts, bias=True),
        ),
        norm=nn.LayerNorm,
        max_positions=12,
        tie_embeddings=False,
    )
    shared = 3 * 7 * D + 2 * 7 + D
    attention_always = 3 * D + (D + 1) * 2 * 8 + D
    experts_always = 5 * D + D + shared
    assert count_parameters(decoder) == ParameterCounts(
        outside=2 * 10 * D + 12 * D,
        always=attention_always + experts_always + 3 * 2 * D,
        experts=(RoutedParameters(5, 3 * 6 * D + 2 * 6),),
        attention=(RoutedParameters(3, 2 * 8 * D + 8),),
    )


def test_layers_may_differ(mixed_decoder: Decoder) -> None:
    counts = count_parameters(mixed_decoder)
    assert counts.experts == (None, RoutedParameters(3, 2 * 5 * D), None)
    assert counts.attention == (None, None, RoutedParameters(2, 2 * 4 * D))


def test_counts_add_up(decoder: Decoder) -> None:
    counts = count_parameters(decoder)
    assert counts.outside + counts.hidden == sum(p.numel() for p in decoder.parameters())


def test_meta_device_counts_the_same(decoder: Decoder) -> None:
    counts = count_parameters(decoder)
    assert count_parameters(decoder.to("meta")) == counts


def test_removed_experts_still_count(small_decoder: Decoder) -> None:
    pruned = prune(small_decoder, Remaining(((0,), (1, 2, 3)), (None, (0, 3))))
    assert count_parameters(pruned) == count_parameters(small_decoder)
