"""A trained decoder that runs only the experts of a plan."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference.compilation import compile_sparse, load_sparse
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.inference.sparse_model import SparseModel
from lightning_dsmoe.routing import LinearRouter, Router, SelectionPlan, TopK
from lightning_dsmoe.serialization.architecture import describe_decoder
from lightning_dsmoe.serialization.pruning import Remaining, prune

from .conftest import (
    FEED_FORWARD,
    UNCOMPILED,
    MakeDecoder,
    assert_near,
    learned_positions_mlp,
    rotary_glu,
    without_routers,
)

TOKENIZER = {"kind": "characters", "characters": "ab\n\N{SNOWMAN}"}


class Own(LinearRouter):
    def __init__(self, d_model: int, n_experts: int, *, sharpness: float = 1.0) -> None:
        super().__init__(d_model, n_experts, init_std=0.5)
        self.sharpness = sharpness

    def score(self, x: Tensor) -> Tensor:
        return super().score(x) * self.sharpness


class Forgetful(Router):
    def __init__(self, d_model: int, n_experts: int, *, width: int = 2) -> None:
        super().__init__(d_model, n_experts)
        self.net = nn.Sequential(nn.Linear(d_model, width), nn.Linear(width, n_experts))

    def score(self, x: Tensor) -> Tensor:
        scored: Tensor = self.net(x)
        return scored


@pytest.fixture(params=[None, "int8"], ids=["float", "int8"])
def quantization(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_all_experts_are_the_dense_model(decoder: Decoder, tokens: Tensor) -> None:
    model = compile_sparse(decoder, SelectionPlan())
    dense = decoder(tokens).logits
    assert_near(model.logits(tokens), dense)
    everyone = SelectionPlan(experts=TopK(4), attention=TopK(3))
    assert_near(model.logits(tokens, plan=everyone), dense)


def test_logits_are_those_of_the_decoder_under_the_plan(
    decoder: Decoder, plan: SelectionPlan, tokens: Tensor
) -> None:
    model = compile_sparse(decoder, plan)
    expected = decoder(tokens, plan).logits
    assert_near(model.logits(tokens), expected)
    assert not torch.allclose(expected, decoder(tokens).logits, atol=1e-2)
    other = SelectionPlan(experts=TopK(1), attention=TopK(1))
    assert_near(model.logits(tokens, plan=other), decoder(tokens, other).logits)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :5] = False
    masked = model.logits(tokens, mask=mask)
    assert_near(masked, decoder(tokens, plan, mask=mask).logits)
    assert not torch.allclose(masked[0], expected[0], atol=1e-2)


def test_the_trained_model_stays_as_it_is(
    make_decoder: MakeDecoder, plan: SelectionPlan, quantization: Any, tokens: Tensor
) -> None:
    decoder = make_decoder().train()
    before = copy.deepcopy(decoder.state_dict())
    model = compile_sparse(decoder, plan, quantization=quantization)
    assert decoder.training
    assert not model.decoder.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in decoder.parameters())
    assert decoder.state_dict().keys() == before.keys()
    expected = model.logits(tokens)
    for name, parameter in decoder.state_dict().items():
        assert torch.equal(parameter, before[name])
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
    assert torch.equal(model.logits(tokens), expected)


def test_a_module_around_a_decoder(one_decoder: Decoder, plan: SelectionPlan) -> None:
    around = nn.Module()
    with pytest.raises(ValueError, match="this Module has none"):
        compile_sparse(around, plan)
    around.decoder = one_decoder
    assert compile_sparse(around, plan).architecture == describe_decoder(one_decoder)


def test_compiled_blocks_are_copied_uncompiled(
    one_decoder: Decoder, plan: SelectionPlan, tokens: Tensor, tmp_path: Path
) -> None:
    expected = one_decoder(tokens, plan).logits
    for block in one_decoder.blocks:
        block.compile()
    model = compile_sparse(one_decoder, plan)
    assert all(block._compiled_call_impl is None for block in model.decoder.blocks)
    model.save(tmp_path / "model")
    assert_near(load_sparse(tmp_path / "model").logits(tokens), expected)


def test_new_weights_are_those_that_run(
    one_decoder: Decoder, plan: SelectionPlan, tokens: Tensor
) -> None:
    model, other = compile_sparse(one_decoder, plan), compile_sparse(rotary_glu(), plan)
    before = model.engine.layout(2)
    model.load_state_dict(other.state_dict())
    after = model.engine.layout(2)
    assert after is not before
    for name, weight in other.engine.layout(2).state_dict().items():
        assert torch.equal(after.state_dict()[name], weight)
    assert torch.equal(model.logits(tokens), other.logits(tokens))


def test_autocast_makes_no_difference(
    decoder: Decoder, plan: SelectionPlan, tokens: Tensor
) -> None:
    model = compile_sparse(decoder, plan, switch_points=UNCOMPILED)
    logits, texts = model.logits(tokens), model.generate(tokens, 3, temperature=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.logits(tokens), logits)
        assert torch.equal(model.generate(tokens, 3, temperature=0), texts)


def test_saved_and_loaded_it_is_the_same(
    decoder: Decoder, plan: SelectionPlan, quantization: Any, tokens: Tensor, tmp_path: Path
) -> None:
    options = {
        "quantization": quantization,
        "quantize_head": quantization is not None,
        "switch_points": SwitchPoints(gather_up_to=0, grouped_from=7),
        "context_length": 18,
        "tokenizer": TOKENIZER,
    }
    model = compile_sparse(decoder, plan, **options)
    model.save(tmp_path / "model")
    loaded = load_sparse(tmp_path / "model")
    assert loaded.plan == plan
    options["tokenizer_description"] = options.pop("tokenizer")
    for name, option in options.items():
        assert getattr(loaded, name) == option
    assert loaded.architecture == describe_decoder(decoder)
    dropouts = [m for m in loaded.decoder.modules() if isinstance(m, nn.Dropout)]
    assert dropouts
    assert not any(module.training for module in dropouts)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        actual = loaded.state_dict()[name]
        assert actual.dtype == tensor.dtype
        assert torch.equal(actual, tensor), name
    for some in (plan, SelectionPlan()):
        assert torch.equal(loaded.logits(tokens, plan=some), model.logits(tokens, plan=some))
    drawn = [
        each.generate(tokens, 6, generator=torch.Generator().manual_seed(3))
        for each in (model, loaded)
    ]
    assert torch.equal(drawn[0], drawn[1])
    loaded.save(tmp_path / "again")
    for file in (tmp_path / "model").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_half_precision_outlives_a_file(
    decoder: Decoder, plan: SelectionPlan, quantization: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model = compile_sparse(decoder, plan, quantization=quantization).bfloat16()
    model.save(tmp_path / "model")
    loaded = load_sparse(tmp_path / "model")
    expected = model.logits(tokens)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(loaded.logits(tokens), expected)


def test_eight_bits_stay_close(decoder: Decoder, tokens: Tensor) -> None:
    model = compile_sparse(decoder, SelectionPlan(), quantization="int8")
    exact = decoder(tokens).logits
    difference = (model.logits(tokens) - exact).abs()
    assert 0 < difference.mean() < 0.05 * exact.std()


@pytest.mark.parametrize("make", [rotary_glu, learned_positions_mlp, without_routers])
def test_report_counts_bytes(make: MakeDecoder, quantization: Any) -> None:
    decoder = make()
    n_bytes = 4 * sum(parameter.numel() for parameter in decoder.parameters())
    model = compile_sparse(decoder, SelectionPlan(), quantization=quantization)
    report = model.report()
    if quantization is None or make is without_routers:
        assert report == (n_bytes, {})
        return
    names = ("attention.heads.w_q", "attention.heads.w_o")
    names += ("feed_forward.experts.w_in", "feed_forward.experts.w_out")
    expected = {f"blocks.{n}.{name}" for n in range(2) for name in names}
    assert set(report.quantized) == expected
    before = 4 * sum(decoder.get_submodule(name).weight.numel() for name in expected)
    assert report.n_bytes == n_bytes - before + sum(report.quantized.values())
    assert before / 4 < sum(report.quantized.values()) < before


def test_generating_looks_back_on_the_context(decoder: Decoder, tokens: Tensor) -> None:
    everyone = SelectionPlan()
    model = compile_sparse(decoder, everyone, context_length=6, switch_points=UNCOMPILED)
    short = model.generate(tokens[:, :5], 9, temperature=0)
    assert torch.equal(short, model.generate(tokens[:, :5], 9, temperature=0, context_length=6))
    assert not torch.equal(
        short, model.generate(tokens[:, :5], 9, temperature=0, context_length=14)
    )
    with pytest.raises(ValueError, match="16 tokens, the context holds 6"):
        model.generate(tokens, 1)
    assert compile_sparse(decoder, everyone).context_length == decoder.max_positions


def test_generating_runs_the_plan(decoder: Decoder, tokens: Tensor) -> None:
    sparse = SelectionPlan(experts=TopK(1), attention=TopK(1))
    prompts = tokens.view(12, 4)
    model = compile_sparse(decoder, sparse, switch_points=UNCOMPILED)
    own = model.generate(prompts, 3, temperature=0)
    assert torch.equal(own[:, 4], decoder(prompts, sparse).logits[:, -1].argmax(-1))
    dense = model.generate(prompts, 3, temperature=0, plan=SelectionPlan())
    assert torch.equal(dense[:, 4], decoder(prompts).logits[:, -1].argmax(-1))
    assert not torch.equal(own, dense)
    everyone = SelectionPlan()
    assert torch.equal(model.generate(prompts, 3, everyone, temperature=0), dense)
    assert torch.equal(model.logits(prompts, everyone), model(prompts, everyone).logits)


def test_a_router_from_elsewhere_comes_along(tokens: Tensor, tmp_path: Path) -> None:
    router = partial(Own, sharpness=3.0)
    decoder = rotary_glu(feed_forward=partial(FEED_FORWARD, router=router))
    plan = SelectionPlan(experts=TopK(2))
    model = compile_sparse(decoder, plan)
    model.save(tmp_path / "model")
    loaded = load_sparse(tmp_path / "model")
    actual = loaded.decoder.blocks[1].feed_forward.router
    assert type(actual) is Own
    assert actual.sharpness == 3.0
    assert_near(loaded.logits(tokens), decoder(tokens, plan).logits)


def test_a_router_that_forgets_its_options_cannot_be_saved() -> None:
    decoder = rotary_glu(feed_forward=partial(FEED_FORWARD, router=Forgetful))
    with pytest.raises(ValueError, match="Forgetful does not keep its option 'width'"):
        compile_sparse(decoder, SelectionPlan())


@pytest.mark.parametrize("as_path", [False, True])
def test_a_sparse_model_is_compiled_again_from_whole_weights(
    as_path: bool, decoder: Decoder, plan: SelectionPlan, tmp_path: Path
) -> None:
    pruned = prune(decoder, Remaining(((0, 2, 3), None), (None, (1,))))
    first = compile_sparse(pruned, SelectionPlan(), context_length=9, tokenizer=TOKENIZER)
    first.save(tmp_path / "model")
    source = tmp_path / "model" if as_path else first
    again = compile_sparse(source, plan, quantization="int8", quantize_head=True)
    expected = compile_sparse(pruned, plan, quantization="int8", quantize_head=True)
    assert (again.plan, again.context_length, again.tokenizer_description) == (plan, 9, TOKENIZER)
    assert again.architecture == expected.architecture
    assert again.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for quantized in (again, compile_sparse(first, plan, quantize_head=True)):
        with pytest.raises(ValueError, match="of this sparse model are in 8 bits already"):
            compile_sparse(quantized, plan)
    with pytest.raises(ValueError, match="is part of a sparse model: give the sparse model or"):
        compile_sparse(first.decoder, plan)


def test_impossible_options(one_decoder: Decoder, plan: SelectionPlan) -> None:
    with pytest.raises(ValueError, match="quantization must be None or 'int8', got 'int4'"):
        compile_sparse(one_decoder, plan, quantization="int4")  # type: ignore[arg-type]
    for some, message in (
        (SelectionPlan(layers={"blocks.2": TopK(1)}), "no routed layer 'blocks.2'"),
        (SelectionPlan(attention=TopK(4)), r"attention, blocks.0.attention: TopK\(k=4\) needs"),
    ):
        with pytest.raises(ValueError, match=message):
            compile_sparse(one_decoder, some)
        with pytest.raises(ValueError, match=message):
            SparseModel(one_decoder, some, architecture=describe_decoder(one_decoder))


def test_the_card_tells_people_what_they_have(
    decoder: Decoder, plan: SelectionPlan, quantization: Any, tmp_path: Path
) -> None:
    model = compile_sparse(decoder, plan, quantization=quantization)
    model.save(tmp_path / "model", certificate={"loss": 1.25, "tokens": 96})
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"2 layers of width {decoder.d_model}, vocabulary of 29" in card
    assert "experts: 4 in 2 layers; running: top 2 in 1 layer, threshold 0.9 in 1 layer" in card
    assert "experts: 3 in 2 layers; running: top 1 renormalized in 1 layer, threshold 0.8" in card
    assert "- loss: 1.25\n- predicted tokens: 96\n" in card
    eight_bits = "- in 8 bits: the attention experts and the feed-forward experts of every layer"
    assert (eight_bits in card) == (quantization == "int8")
    assert ("- in 8 bits: nothing" in card) == (quantization is None)
    model.save(tmp_path / "model")
    assert "Nothing yet." in (tmp_path / "model" / "README.md").read_text()
