"""A decoder's architecture as plain data, and back."""

import copy
import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dsmoe.attention import GroupedQueryAttention, Llama3RopeScaling, YarnRopeScaling
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.experts import FeedForward, GLUExperts, MLPExperts
from lightning_dsmoe.routing import CosineRouter, LinearRouter, MLPRouter, Router
from lightning_dsmoe.serialization.architecture import build_decoder, describe_decoder, differences
from lightning_dsmoe.serialization.checkpoint import fill

from ..inference.conftest import ATTENTION, FEED_FORWARD, rotary_glu, without_routers


class Frozen(Router):
    def __init__(self, d_model: int, n_experts: int, *, temperature: float = 1.0) -> None:
        super().__init__(d_model, n_experts)
        self.temperature = temperature
        self.register_buffer("weight", torch.randn(n_experts, d_model))

    def score(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype).mT / self.temperature


class Forgetful(Frozen):
    def __init__(self, d_model: int, n_experts: int, *, sharpness: float = 1.0) -> None:
        super().__init__(d_model, n_experts, temperature=1 / sharpness)


HEADS = partial(GroupedQueryAttention, n_heads=4, n_kv_heads=2, d_head=4)
GELU = "gelu_tanh"

VARIANTS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "other positions": {"max_positions": 18, "tie_embeddings": False},
    "layer norm": {"norm": partial(nn.LayerNorm, eps=1e-2, elementwise_affine=False)},
    "layer norm without bias": {"norm": partial(nn.LayerNorm, bias=False)},
    "RMS norm with its own eps": {"norm": partial(nn.RMSNorm, eps=0.1)},
    "plain layers": {
        "attention": partial(
            GroupedQueryAttention, n_heads=6, n_kv_heads=3, d_head=2, rope_theta=50.0, bias=True
        ),
        "feed_forward": partial(FeedForward, d_hidden=7, experts=GLUExperts),
    },
    "attention without positions": {
        "attention": partial(ATTENTION, n_heads=2, rope_theta=None, qk_norm=True, bias=True)
    },
    "gates that sum to one": {
        "attention": partial(ATTENTION, gate_scale="sum_to_one"),
        "feed_forward": partial(FEED_FORWARD, gate_scale="sum_to_one", d_shared=3),
    },
    "MLP experts with biases": {
        "feed_forward": partial(
            FEED_FORWARD, experts=partial(MLPExperts, bias=True, activation="relu")
        )
    },
    "MLP router": {"feed_forward": partial(FEED_FORWARD, router=partial(MLPRouter, d_hidden=5))},
    "cosine router": {
        "attention": partial(ATTENTION, router=partial(CosineRouter, d_hidden=3, init_scale=8.0))
    },
    "a norm of the projection, and a part that rotates": {
        "attention": partial(
            HEADS, qk_norm="projection", norm_eps=1e-3, bias=True, output_bias=False
        )
    },
    "scaled positions": {
        "attention": partial(
            ATTENTION, rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 64), rotary_fraction=0.5
        )
    },
    "a gate of the shared expert": {
        "feed_forward": partial(
            FEED_FORWARD, d_shared=3, shared_gate=True, experts=partial(MLPExperts, activation=GELU)
        )
    },
    "layers that differ": {
        "attention": [ATTENTION, partial(HEADS, rope_scaling=YarnRopeScaling(2.0, 64))],
        "feed_forward": [partial(FeedForward, d_hidden=7), FEED_FORWARD],
    },
    "a router from elsewhere": {
        "feed_forward": partial(FEED_FORWARD, router=partial(Frozen, temperature=0.3))
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_description_rebuilds_the_same_model(variant: str, tokens: Tensor) -> None:
    decoder = rotary_glu(**VARIANTS[variant])
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    description = json.loads(json.dumps(describe_decoder(decoder), allow_nan=False))
    rebuilt = build_decoder(description)
    assert describe_decoder(rebuilt) == description
    assert not rebuilt.training
    fill(rebuilt, decoder.state_dict())
    assert torch.equal(rebuilt(tokens).logits, decoder(tokens).logits)


def test_what_a_description_says() -> None:
    router = {"class_path": "lightning_dsmoe.LinearRouter", "init_args": {"init_std": 0.5}}
    assert describe_decoder(rotary_glu()) == {
        "vocab_size": 29,
        "d_model": 16,
        "n_layers": 2,
        "max_positions": None,
        "tie_embeddings": True,
        "attention": {
            "class_path": "lightning_dsmoe.MixtureOfAttentionHeads",
            "init_args": {
                "n_experts": 3,
                "n_heads": 1,
                "d_head": 4,
                "router": router,
                "gate_scale": "mean_one",
                "rope_theta": 10000.0,
                "rope_scaling": None,
                "rotary_fraction": 1.0,
                "qk_norm": False,
                "norm_eps": None,
                "bias": False,
                "output_bias": None,
                "causal": True,
            },
        },
        "feed_forward": {
            "class_path": "lightning_dsmoe.MixtureOfExperts",
            "init_args": {
                "n_experts": 4,
                "d_expert": 6,
                "router": router,
                "experts": {
                    "class_path": "lightning_dsmoe.GLUExperts",
                    "init_args": {"activation": "silu", "bias": False},
                },
                "d_shared": 0,
                "shared_gate": False,
                "gate_scale": "mean_one",
            },
        },
        "norm": {
            "class_path": "torch.nn.RMSNorm",
            "init_args": {"eps": None, "elementwise_affine": True},
        },
    }


def test_a_class_from_elsewhere_keeps_its_own_path() -> None:
    decoder = rotary_glu(feed_forward=partial(FEED_FORWARD, router=Frozen))
    found = describe_decoder(decoder)["feed_forward"]["init_args"]["router"]
    assert found == {"class_path": f"{__name__}.Frozen", "init_args": {"temperature": 1.0}}


def test_classes_named_by_their_full_paths_are_built_too(decoder: Decoder) -> None:
    description = describe_decoder(decoder)
    older = copy.deepcopy(description)
    older["feed_forward"]["class_path"] = "lightning_dsmoe.experts.mixture.MixtureOfExperts"
    older["feed_forward"]["init_args"]["router"]["class_path"] = (
        "lightning_dsmoe.routing.router.LinearRouter"
    )
    older["norm"]["class_path"] = "torch.nn.modules.normalization.RMSNorm"
    assert describe_decoder(build_decoder(older)) == description
    assert differences(older, description) == []


def test_building_takes_no_memory_and_draws_nothing(decoder: Decoder) -> None:
    description = describe_decoder(decoder)
    description |= {"vocab_size": 2**24, "d_model": 2**20}
    description["feed_forward"]["init_args"] |= {"n_experts": 4096, "d_expert": 2**20}
    before = torch.get_rng_state()
    rebuilt = build_decoder(description)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.is_meta for parameter in rebuilt.parameters())
    assert sum(parameter.numel() for parameter in rebuilt.parameters()) > 2**52


@pytest.mark.parametrize("name", ["blocks.1.attention_norm", "blocks.0.feed_forward_norm", "norm"])
def test_norms_must_be_alike(decoder: Decoder, name: str) -> None:
    decoder.get_submodule(name).eps = 0.5  # type: ignore[assignment]
    with pytest.raises(ValueError, match="the norms of this decoder differ"):
        describe_decoder(decoder)


def layers_that_differ() -> dict[str, Any]:
    return describe_decoder(rotary_glu(**VARIANTS["layers that differ"]))


def test_layers_that_differ_are_described_one_by_one() -> None:
    description = layers_that_differ()
    first, second = description["feed_forward"]
    assert first["class_path"] == "lightning_dsmoe.FeedForward"
    assert second == describe_decoder(rotary_glu(feed_forward=FEED_FORWARD))["feed_forward"]
    scaling = description["attention"][1]["init_args"]["rope_scaling"]
    assert scaling["class_path"] == "lightning_dsmoe.YarnRopeScaling"
    assert scaling["init_args"]["factor"] == 2.0
    alike = describe_decoder(rotary_glu(attention=[ATTENTION, ATTENTION]))
    assert alike == describe_decoder(rotary_glu())
    one_by_one = {**alike, "attention": [alike["attention"]] * 2}
    assert describe_decoder(build_decoder(one_by_one)) == alike
    assert differences(one_by_one, alike) == []


def test_descriptions_without_later_options_mean_their_defaults() -> None:
    now = describe_decoder(rotary_glu())
    older = copy.deepcopy(now)
    for name in ("rope_scaling", "rotary_fraction", "norm_eps", "output_bias"):
        del older["attention"]["init_args"][name]
    del older["feed_forward"]["init_args"]["shared_gate"]
    assert describe_decoder(build_decoder(older)) == now
    assert differences(older, now) == []


def test_differences_of_layers_that_differ() -> None:
    before = layers_that_differ()
    now = changed(before, "feed_forward.1.init_args.n_experts", 3)
    now = changed(now, "attention.1.init_args.rope_scaling.init_args.factor", 4.0)
    assert differences(before, now) == [
        "attention.1.rope_scaling.factor was 2.0, is 4.0",
        "feed_forward.1.n_experts was 4, is 3",
    ]
    of_all = {**before, "feed_forward": before["feed_forward"][1]}
    found = differences(of_all, before)
    assert "feed_forward.0.d_hidden was None, is 7" in found
    assert not any(each.startswith("feed_forward.1") for each in found)
    assert "feed_forward.0.d_hidden was 7, is None" in differences(before, of_all)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("attention", [], r"attention must be a list of length 1 to 1024, got \[\]$"),
        ("feed_forward", [None, None], r"feed_forward\[0\] must be an object, got None$"),
        ("norm", [], r"norm must be an object, got \[\]$"),
        ("n_layers", 3, "attention must be one for all layers or one for each, got 2 for 3$"),
        ("feed_forward.1.class_path", "os.system", "'os.system' is not a known FeedForwardLayer"),
        ("feed_forward.1.init_args.n_experts", 10**9, "n_experts=1000000000 is out of range"),
        ("feed_forward.1.init_args.shared_gate", True, "shared_gate needs a shared expert"),
        ("attention.1.init_args.rotary_fraction", 7.0, "rotary_fraction must be above 0 and at"),
        ("attention.1.init_args.qk_norm", "all", "qk_norm must be true, false or 'projection'"),
        ("attention.0.init_args.qk_norm", "projection", "true or false, got 'projection'"),
        ("attention.1.init_args.norm_eps", float("nan"), "'norm_eps' must be finite, got nan"),
        ("attention.1.init_args.rope_scaling", "yarn", "rope_scaling must be an object, got 'y"),
        (
            "attention.1.init_args.rope_scaling.class_path",
            "lightning_dsmoe.attention.RopeScaling",
            "not an architecture: RopeScaling",
        ),
        (
            "attention.1.init_args.rope_scaling.class_path",
            "lightning_dsmoe.TopK",
            "is not a known RopeScaling",
        ),
        (
            "attention.1.init_args.rope_scaling.init_args.original_max_positions",
            2**30,
            "original_max_positions=1073741824 is out of range",
        ),
        (
            "attention.1.init_args.rope_scaling.init_args.factor",
            float("inf"),
            "'factor' must be finite, got inf",
        ),
        ("attention.1.init_args.rope_scaling.init_args.factor", "2", "not an architecture"),
    ],
)
def test_other_descriptions_of_layers_are_refused(path: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_decoder(changed(layers_that_differ(), path, value))
    assert "\n" not in str(caught.value)


class NormOfAFunction(nn.Module):
    def __init__(self, size: int, scale: Any = None) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_parts_that_cannot_be_described() -> None:
    class Local(LinearRouter):
        pass

    for options, message in (
        (
            {"feed_forward": partial(FEED_FORWARD, router=Forgetful)},
            "Forgetful does not keep its option 'sharpness' as an attribute",
        ),
        ({"feed_forward": partial(FEED_FORWARD, router=Local)}, "Local' is not a known Router"),
        ({"norm": partial(NormOfAFunction, scale=print)}, "option 'scale' is <built-in function"),
        ({"norm": partial(NormOfAFunction, scale=nn.ReLU())}, "option 'scale' is a ReLU"),
        ({"norm": lambda size: nn.Linear(size, size)}, "'torch.nn.Linear' is not a known Module"),
    ):
        with pytest.raises(ValueError, match=message):
            describe_decoder(rotary_glu(**options))


def test_the_class_must_be_the_one_at_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = rotary_glu(feed_forward=partial(FEED_FORWARD, router=Frozen))
    monkeypatch.setitem(globals(), "Frozen", Forgetful)
    with pytest.raises(ValueError, match=r"the class of router cannot be found again at .*Frozen"):
        describe_decoder(decoder)


def changed(description: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    description = copy.deepcopy(description)
    *parents, last = path.split(".")
    inner = description
    for name in parents:
        inner = inner[int(name) if isinstance(inner, list) else name]
    inner[last] = value
    return description


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("surprise", 1, r"architecture must have the fields vocab_size, .*\['surprise'\]$"),
        ("vocab_size", 10**9, "vocab_size must be an integer from 1 to 16777216, got 1000000000"),
        ("vocab_size", "29", "vocab_size must be an integer from .*, got '29'"),
        ("n_layers", 2.0, r"n_layers must be an integer from .*, got 2\.0"),
        ("n_layers", 10**6, "n_layers must be an integer from 1 to 1024, got 1000000"),
        ("d_model", 0, "d_model must be an integer from 1 to 16777216, got 0"),
        ("max_positions", "many", "max_positions must be null or an integer .*, got 'many'"),
        ("max_positions", 0, "max_positions must be null or an integer from 1 to .*, got 0"),
        ("tie_embeddings", 1, "tie_embeddings must be true or false, got 1"),
        ("attention", None, "architecture: attention must be an object, got None"),
        (
            "attention",
            "lightning_dsmoe.MixtureOfAttentionHeads",
            "attention must be an object, got",
        ),
        ("attention.class_path", "os.system", "'os.system' is not a known Attention"),
        ("attention.class_path", "lightning_dsmoe.MixtureOfExperts", "not a known Attention"),
        ("attention.init_args", [1], "attention: init_args must be an object, got"),
        ("attention.init_args.d_head", 3, "an even d_head"),
        ("attention.init_args.d_model", 16, "not an architecture: .*d_model"),
        ("attention.init_args.n_experts", None, "not an architecture"),
        ("feed_forward.init_args.n_experts", 10**9, "n_experts=1000000000 is out of range"),
        ("feed_forward.init_args.n_experts", 0, "needs d_model >= 1 and n_experts >= 1"),
        ("feed_forward.init_args.d_expert", -1, "d_expert=-1 is out of range"),
        ("feed_forward.init_args.d_expert", 6.0, "not an architecture"),
        ("feed_forward.init_args.d_expert", [6], r"option 'd_expert' must be plain data, got \[6"),
        ("feed_forward.init_args.router", "MLPRouter", "router must be an object, got 'MLPR"),
        (
            "feed_forward.init_args.router.extra",
            1,
            "router must have the fields class_path, init_args; .*extra",
        ),
        ("feed_forward.init_args.router.init_args.width", 1, "unexpected keyword .*'width'"),
        ("feed_forward.init_args.experts.init_args.activation", "no_such", "got 'no_such'$"),
        ("feed_forward.init_args.experts.init_args.activation", "dropout", "got 'dropout'$"),
        ("attention.init_args.rope_theta", float("nan"), "'rope_theta' must be finite, got nan"),
        ("norm.init_args.eps", float("inf"), "'eps' must be finite, got inf"),
        ("norm.class_path", "torch.nn.Linear", "'torch.nn.Linear' is not a known Module"),
        ("norm.init_args.device", "cuda", "norm: init_args must not name d"),
        ("norm.init_args.dtype", None, "norm: init_args must not name d"),
    ],
)
def test_other_descriptions_are_refused(path: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_decoder(changed(describe_decoder(rotary_glu()), path, value))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_experts": 4097}, "n_experts=4097 is out of range, 0 to 4096 is allowed"),
        ({"d_shared": 2**24 + 1}, "d_shared=16777217 is out of range"),
    ],
)
def test_what_could_not_be_built_again_is_not_described(
    options: dict[str, int], message: str
) -> None:
    with torch.device("meta"):
        decoder = Decoder(
            29, 16, 1, attention=ATTENTION, feed_forward=partial(FEED_FORWARD, **options)
        )
    with pytest.raises(ValueError, match=message):
        describe_decoder(decoder)


def test_a_description_without_end_is_refused() -> None:
    description = describe_decoder(rotary_glu())
    router = description["feed_forward"]["init_args"]["router"]
    for _ in range(3000):
        router = {"class_path": router["class_path"], "init_args": {"router": router}}
    with pytest.raises(ValueError, match="not an architecture: maximum recursion depth"):
        build_decoder(changed(description, "feed_forward.init_args.router", router))


@pytest.mark.parametrize("description", [None, [], "decoder", {}, {"d_model": 3}])
def test_other_data_is_refused(description: Any) -> None:
    with pytest.raises(ValueError, match=r"architecture must (be an object|have the fields)"):
        build_decoder(description)


def test_differences_name_every_change() -> None:
    before = describe_decoder(rotary_glu())
    now = describe_decoder(without_routers())
    assert differences(before, before) == []
    assert differences(before, {**before, "d_model": 3}) == ["d_model was 16, is 3"]
    found = differences(before, now)
    assert "d_model was 16, is 12" in found
    assert (
        "feed_forward.class_path was lightning_dsmoe.MixtureOfExperts, "
        "is lightning_dsmoe.FeedForward"
    ) in found
    assert "feed_forward.n_experts was 4, is None" in found
    assert "feed_forward.d_hidden was None, is 10" in found
    assert "attention.n_heads was 1, is 4" in found
    unknown = changed(before, "norm.class_path", "gone.Norm")
    renamed = changed(before, "norm.class_path", "moved.Norm")
    assert differences(unknown, renamed) == ["norm.class_path was gone.Norm, is moved.Norm"]
    (long,) = differences(before, {**before, "d_model": {"\n" * 10**6: ["x\n" * 10**6] * 10**4}})
    assert len(long) < 300
    assert "\n" not in long
    for other in (True, [1], torch.zeros(2)):
        assert differences(other, before)[0].startswith("the architecture was ")
        assert len(differences({**before, "d_model": [torch.zeros(2)]}, before)) == 1
        assert len(differences({**before, "d_model": torch.zeros(2)}, before)) == 1
    gate = changed(before, "feed_forward.init_args.gate_scale", "a\nb" * 9999)
    with pytest.raises(ValueError, match="gate_scale must be") as raised:
        build_decoder(gate)
    assert len(str(raised.value)) < 1001
    assert "\n" not in str(raised.value)
