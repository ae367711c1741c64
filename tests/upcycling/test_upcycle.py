"""Dense layers of modules as mixtures: recognised by what they compute, or refused."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dsmoe import (
    Decoder,
    FeedForward,
    GLUExperts,
    GroupedQueryAttention,
    MixtureOfExperts,
    TopK,
    routed_layers,
    upcycle,
)
from lightning_dsmoe.upcycling import DenseMLP

D, U, E = 12, 30, 4  # 4 does not divide 30


class Gated(nn.Module):
    def __init__(self, act: Any = None, *, bias: bool = False, factor: float = 1.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(D, U, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(U, D, bias=bias)
        self.act_fn, self.factor = act or nn.SiLU(), factor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y * self.factor


class UpFirst(Gated):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
        return y


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(D, 2 * U), nn.Linear(U, D)

    def forward(self, x: Tensor) -> Tensor:  # the activation is in the code alone
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        y: Tensor = self.down_proj(F.gelu(gate) * up)
        return y


class Conv1D(nn.Module):
    def __init__(self, width: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, n_out) / 4)
        self.bias = nn.Parameter(torch.randn(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class GPT2MLP(nn.Module):
    def __init__(self, dropout: float = 0.0, *, inside: bool = False) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(D, U), Conv1D(U, D)
        self.act, self.dropout, self.inside = nn.GELU("tanh"), nn.Dropout(dropout), inside

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.c_fc(x))
        y: Tensor = self.c_proj(self.dropout(hidden) if self.inside else hidden)
        return y if self.inside else self.dropout(y)


def plain(act: nn.Module, *, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(D, U, bias=bias), act, nn.Linear(U, D, bias=bias))


def square() -> nn.Module:
    """Every weight has one shape, so that only the outputs tell the layers apart."""
    return nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))


KINDS = {
    "swiglu": Gated,
    "geglu": lambda: Gated(nn.GELU()),
    "geglu_tanh": lambda: Gated(partial(F.gelu, approximate="tanh")),
    "biases": lambda: Gated(bias=True),
    "up_first": UpFirst,
    "fused": Fused,
    "gpt2": GPT2MLP,
    "gpt2_dropout": lambda: GPT2MLP(0.3),
    "gelu": lambda: plain(nn.GELU()),
    "relu_no_bias": lambda: plain(nn.ReLU(), bias=False),
    "silu": lambda: plain(nn.SiLU()),
    "square": square,
}


class Model(nn.Module):
    """A residual layer around a feed-forward layer."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.mlp(x)
        return y


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize("split", ["contiguous", "weights", "activations"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_dense_layer(kind: str, split: Any) -> None:
    model = Model(KINDS[kind]()).eval()
    dense = copy.deepcopy(model)
    x = torch.randn(3, 5, D)
    [name] = upcycle(model, E, split=split, tokens=x)
    assert list(routed_layers(model)) == [name]
    xs = [x.clone().requires_grad_() for _ in range(2)]
    ys = [each(x) for each, x in zip((model, dense), xs, strict=True)]
    assert relative(*ys) < 1e-6
    for y in ys:
        y.square().sum().backward()
    assert relative(xs[0].grad, xs[1].grad) < 1e-5  # type: ignore[arg-type]
    assert not model.training


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_is_its_own_neurons(kind: str) -> None:
    """Expert by expert: none twice, none lost, gate and up in their places."""
    model = Model(KINDS[kind]()).eval()
    dense, x = copy.deepcopy(model.mlp), torch.randn(9, D)
    upcycle(model, E)
    [mixture] = routed_layers(model).values()
    assert isinstance(mixture, MixtureOfExperts)
    last = [m for m in dense.modules() if getattr(m, "weight", None) is not None][-1]
    weight: Any = last.weight
    n_neurons = D if kind == "square" else U
    outputs = weight if isinstance(last, Conv1D) else weight.mT  # `[U, D]`
    bias = 0 if last.bias is None else last.bias
    for expert, neurons in enumerate(torch.arange(n_neurons).tensor_split(E)):
        others = torch.ones(n_neurons, dtype=torch.bool).index_fill(0, neurons, False)
        with torch.no_grad():
            kept = outputs.clone()
            outputs[others] = 0
            alone = dense(x) - bias
            outputs.copy_(kept)
            gates = F.one_hot(torch.full((9,), expert), E).float()
            found = mixture.experts(x, gates) - (0 if last.bias is None else bias)
        assert relative(found, alone) < 1e-5


def test_dropout_of_the_output_stays() -> None:
    model = Model(GPT2MLP(0.4)).train()
    dense, x = copy.deepcopy(model), torch.randn(2, 3, D)
    upcycle(model, E)
    ys = []
    for each in (model, dense):
        torch.manual_seed(3)
        ys.append(each(x))
    assert relative(*ys) < 1e-6
    assert model.training


class Clamped(Gated):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act_fn(self.gate_proj(x)).clamp(max=2.5) * self.up_proj(x)
        y: Tensor = self.down_proj(hidden)
        return y


class TwoArguments(Gated):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + residual


@pytest.mark.parametrize(
    "mlp",
    [
        Gated(factor=1.001),
        Clamped(),
        Gated(lambda x: x * torch.sigmoid(1.702 * x)),
        Gated(nn.LeakyReLU(0.3)),
        GPT2MLP(0.3, inside=True),
        TwoArguments(),
        nn.Sequential(nn.Linear(D, U), nn.PReLU(), nn.Linear(U, D)),
    ],
    ids=["multiplier", "clamp", "quick_gelu", "slope", "dropout", "arguments", "prelu"],
)
def test_what_computes_something_else_is_refused(mlp: nn.Module) -> None:
    model = nn.ModuleDict({"first": Model(Gated()), "second": Model(mlp), "third": Model(mlp)})
    before = list(model.modules())
    with pytest.raises(ValueError, match=rf"second\.mlp \({type(mlp).__name__}\)"):
        upcycle(model, E)
    assert list(model.modules()) == before  # the first one neither


def test_all_that_is_not_recognised_is_listed() -> None:
    odd = {name: Model(Clamped()) for name in "abc"}
    with pytest.raises(ValueError, match=r"a\.mlp \(Clamped\).*b\.mlp \(Clamped\).*c\.mlp"):
        upcycle(nn.ModuleDict(odd), E)


def test_a_function_names_others() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([torch.randn(U, D), torch.randn(U, D)])

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weights[0].mT).relu() @ self.weights[1]

    def find(name: str, module: nn.Module) -> DenseMLP | None:
        if not isinstance(module, Stacked):
            return None
        return DenseMLP((module.weights[0],), module.weights[1], activation)

    model = Model(Stacked())
    activation = "gelu"  # which it is not
    with pytest.raises(ValueError, match=r"mlp \(Stacked\): its outputs differ"):
        upcycle(model, E, find=find)
    activation = "relu"
    x = torch.randn(7, D)
    before = model(x)
    assert upcycle(model, E, find=find) == ["mlp.layer"]
    assert relative(model(x), before) < 1e-6


def test_own_feed_forward_becomes_a_bare_mixture() -> None:
    decoder = Decoder(
        11,
        D,
        2,
        attention=partial(GroupedQueryAttention, n_heads=2, n_kv_heads=1, d_head=6),
        feed_forward=partial(FeedForward, d_hidden=U, experts=partial(GLUExperts, bias=True)),
    )
    tokens = torch.arange(11)[None]
    before = decoder(tokens).logits
    assert upcycle(decoder, E) == ["blocks.0.feed_forward", "blocks.1.feed_forward"]
    output = decoder(tokens)
    assert relative(output.logits, before) < 1e-5
    assert output.routings.experts[1].probs.shape == (1, 11, E)


def test_types_devices_and_frozen_weights_stay() -> None:
    model = Model(Gated(bias=True).to(torch.bfloat16)).train()
    model.mlp.requires_grad_(False)
    with torch.no_grad():
        upcycle(model, E)
    [layer] = routed_layers(model).values()
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["router.weight"]
    assert layer.training


def test_a_module_in_two_places_stays_one() -> None:
    mlp = Gated()
    model = nn.ModuleDict({"a": Model(mlp), "b": Model(mlp)})
    assert upcycle(model, E) == ["a.mlp.layer"]
    assert model["a"].mlp is model["b"].mlp


def test_weights_shared_with_another_module_are_refused() -> None:
    first, second = Gated(), Gated()
    second.up_proj.weight = first.up_proj.weight
    with pytest.raises(ValueError, match=r"a \(Gated\) shares weights"):
        upcycle(nn.ModuleDict({"a": first, "b": second}), E)


def test_layers_can_be_chosen() -> None:
    model = nn.ModuleDict({"a": Model(Gated()), "b": Model(Clamped())})
    with pytest.raises(ValueError, match="no module 'c'"):
        upcycle(model, E, layers=["a.mlp", "c"])
    assert upcycle(model, E, layers=["a.mlp"]) == ["a.mlp.layer"]
    with pytest.raises(ValueError, match=r"b\.mlp"):  # the mixture is not turned again
        upcycle(model, E)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_experts": 0}, "at least 1, got 0"),
        ({"n_experts": U + 1}, "more than the 30 neurons of mlp"),
        ({"split": "random"}, "split must be one of"),
        ({"router": "one"}, "router must be one of"),
        ({"split": "activations"}, "need the tokens"),
        ({"router": "activations", "tokens": []}, "no tokens reach mlp"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    model = Model(Gated())
    with pytest.raises(ValueError, match=message):
        upcycle(model, **{"n_experts": E, **options})
    assert isinstance(model.mlp, Gated)


def test_nothing_to_turn_and_weights_that_are_nowhere() -> None:
    with pytest.raises(ValueError, match="no feed-forward layer"):
        upcycle(nn.Sequential(nn.Linear(3, 3)), E)
    with torch.device("meta"):
        model = Model(Gated())
    with pytest.raises(ValueError, match="meta device"):
        upcycle(model, E)


def test_a_router_of_activations_prefers_what_contributes() -> None:
    model = Model(Gated()).eval()
    dense = copy.deepcopy(model)
    x = torch.randn(512, D)
    upcycle(model, E, split="activations", router="activations", tokens=x)
    [mixture] = routed_layers(model).values()
    with torch.no_grad():
        expected = dense.mlp(x)
        whole, (_, routing) = mixture(x).output, mixture(x)
        half = mixture(x, TopK(2)).output
        reversed_router = copy.deepcopy(mixture)
        reversed_router.router.weight.neg_()  # type: ignore[operator, union-attr]
        worst = reversed_router(x, TopK(2)).output
    assert 0.01 < float(routing.logits.std()) < 0.06
    assert 0 < float((whole - expected).norm() / expected.norm()) < 0.1
    assert float((half - expected).norm()) < 0.95 * float((worst - expected).norm())


class ByName(nn.Module):
    """Gives its layer the tokens by name."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Gated()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(x=x)
        return y


def test_activations_of_layers_that_are_called_by_name() -> None:
    model = ByName().eval()
    x = torch.randn(7, D)
    before = model(x)
    upcycle(model, E, split="activations", tokens=x)
    assert relative(model(x), before) < 1e-6
