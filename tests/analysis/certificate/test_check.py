import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_dsmoe.analysis.certificate.check import check_weights, differences, is_exact
from lightning_dsmoe.analysis.certificate.judgement import judge
from lightning_dsmoe.analysis.certificate.record import TextSource, certificate
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference import compile_sparse
from lightning_dsmoe.routing import SelectionPlan, Threshold, TopK

from ..conftest import make_decoder, make_text

PLAN = SelectionPlan(experts=Threshold(0.9), attention=TopK(2))


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    decoder = make_decoder()
    text = make_text(decoder)
    judgement = judge(compile_sparse(decoder, PLAN), text, decoder)
    plain: dict[str, Any] = json.loads(
        json.dumps(certificate(judgement, text, TextSource("files", "val")))
    )
    return plain


def scaled(name: str, factor: float) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data[name] *= factor

    return change


def test_the_same_and_nearly_the_same(made: dict[str, Any]) -> None:
    other = copy.deepcopy(made)
    assert differences(made, other) == []
    other |= {"date": "another", "all_experts_error": None, "routing_agreement": 0.5}
    for name, factor in (("dense_loss", 1.0005), ("kl", 1.005), ("active_share_mean", 0.995)):
        other[name] *= factor
    other["active_share_p95"] += 0.001
    other["experts"][1]["bound_max"] *= 1.005
    assert differences(made, other) == []
    assert differences(other, made) == []


@pytest.mark.parametrize(
    ("change", "name", "of_dense"),
    [
        (scaled("dense_loss", 1.002), "dense_loss", True),
        (scaled("sparse_loss", 0.998), "sparse_loss", False),
        (scaled("kl", 1.1), "kl", True),
        (scaled("top_1_agreement", 0.9), "top_1_agreement", True),
        (scaled("active_share_mean", 1.05), "active_share_mean", False),
        (scaled("active_share_p50", 1.05), "active_share_p50", False),
        (scaled("tokens", 2), "tokens", False),
        (lambda data: data["relative_gap_95"].__setitem__(1, 9.0), "relative_gap_95 to", True),
        (
            lambda data: data["experts"][1].update(bound_mean=9.0),
            "experts of layer 1, bound_mean",
            False,
        ),
        (
            lambda data: data["attention"][0].update(error_max=9.0),
            "attention of layer 0, error_max",
            False,
        ),
    ],
)
def test_what_differs(
    change: Callable[[dict[str, Any]], None], name: str, of_dense: bool, made: dict[str, Any]
) -> None:
    other = copy.deepcopy(made)
    change(other)
    [line] = differences(made, other)
    assert line.startswith(f"{name} is ")
    assert ", the certificate says " in line
    assert len(differences(made, other, dense_too=False)) == (not of_dense)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("half", [False, True])
def test_weights_of_the_checkpoint(quantization: Any, half: bool, decoder: Decoder) -> None:
    model = compile_sparse(decoder, PLAN, quantization=quantization, quantize_head=False)
    if half:
        model = model.bfloat16()
    check_weights(model, decoder)
    assert is_exact(model) == (quantization is None and not half)
    with torch.no_grad():
        decoder.blocks[1].feed_forward.experts.w_out.weight[3, 2, 1] += 1.0
    with pytest.raises(
        ValueError, match=r"not made of .*: blocks\.1\.feed_forward\.experts\.w_out"
    ):
        check_weights(model, decoder)


def test_codes_between_two_may_fall_to_either_but_few_do(decoder: Decoder) -> None:
    model = compile_sparse(decoder, PLAN, quantization="int8")
    codes = model.decoder.blocks[0].feed_forward.experts.w_out.weight
    assert codes.dtype == torch.int8
    moved = codes.flatten()
    moved[moved.abs().argmin()] += 1
    check_weights(model, decoder)
    moved -= moved.sign()
    with pytest.raises(ValueError, match=r"blocks\.0\.feed_forward\.experts\.w_out.* differs"):
        check_weights(model, decoder)


def test_the_same_weights_under_other_functions(decoder: Decoder) -> None:
    model = compile_sparse(decoder, PLAN, quantization="int8")
    for block in decoder.blocks:
        block.feed_forward.experts.activation = "relu"
    with pytest.raises(
        ValueError, match=r"not made of this checkpoint: .*activation was relu, is gelu"
    ):
        check_weights(model, decoder)


def test_weights_of_another_architecture(decoder: Decoder) -> None:
    model = compile_sparse(decoder, PLAN)
    del decoder.blocks[1]
    decoder.n_layers = 1
    with pytest.raises(ValueError, match=r"was not made of this checkpoint: blocks\.1\."):
        check_weights(model, decoder)
