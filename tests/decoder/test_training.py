"""Training steps, numerics and the life of a module."""

import copy
import pickle
from collections.abc import Callable, Iterable
from itertools import islice

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from lightning_dsmoe.decoder import Decoder, DecoderOutput
from lightning_dsmoe.losses import mutual_information_loss
from lightning_dsmoe.precision import at_least_float32
from lightning_dsmoe.routing import SelectionPlan, TopK

pytestmark = pytest.mark.slow

MakeDecoder = Callable[..., Decoder]


def language_loss(output: DecoderOutput, tokens: Tensor) -> Tensor:
    logits = at_least_float32(output.logits[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def mutual_information(output: DecoderOutput) -> Tensor:
    found = (*output.routings.experts, *output.routings.attention)
    return sum((mutual_information_loss(r.probs) for r in found if r), start=torch.zeros(()))


def gradients(decoder: Decoder, loss: Tensor) -> dict[str, Tensor]:
    decoder.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}


def test_every_parameter_and_every_expert_gets_a_gradient(
    make_decoder: MakeDecoder, batches: list[Tensor]
) -> None:
    decoder = make_decoder()
    found = gradients(decoder, language_loss(decoder(batches[0]), batches[0]))
    for name, parameter in decoder.named_parameters():
        assert found[name].isfinite().all(), name
        assert found[name].any(), name
        if parameter.ndim == 3:
            assert found[name].flatten(1).any(1).all(), name


def test_router_gradients_agree_with_finite_differences(
    decoder: Decoder, batches: list[Tensor]
) -> None:
    decoder.double()

    def loss_with(weight: Tensor, name: str) -> Tensor:
        output = torch.func.functional_call(decoder, {name: weight}, (batches[0][:1, :6],))
        return language_loss(output, batches[0][:1, :6]) + 0.5 * mutual_information(output)

    for name in ("blocks.0.feed_forward.router.weight", "blocks.1.attention.router.weight"):
        weight = decoder.get_parameter(name).detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_with(weight, name), weight)
        for row, column in ((0, 1), (2, 7)):
            step = torch.zeros_like(weight)
            step[row, column] = 1e-5
            change = loss_with(weight + step, name) - loss_with(weight - step, name)
            assert abs(change / 2e-5 - gradient[row, column]) <= 1e-6


def test_weight_zero_leaves_router_gradients_bitwise_alone(
    decoder: Decoder, batches: list[Tensor]
) -> None:
    found = []
    for weight in (None, 0.0, 0.1):
        output = decoder(batches[0])
        loss = language_loss(output, batches[0])
        if weight is not None:
            loss = loss + weight * mutual_information(output)
        found.append(gradients(decoder, loss)["blocks.0.feed_forward.router.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_recomputing_activations_changes_nothing(
    make_decoder: MakeDecoder, sparse: bool, batches: list[Tensor]
) -> None:
    plain = make_decoder()
    recomputing = make_decoder(checkpoint_activations=True)
    recomputing.load_state_dict(plain.state_dict())
    plan = SelectionPlan(experts=TopK(2), attention=TopK(1))
    found = []
    for decoder in (plain, recomputing):
        torch.manual_seed(5)
        output = decoder(batches[0], plan if sparse else None)
        loss = language_loss(output, batches[0]) + mutual_information(output)
        found.append((loss.detach(), gradients(decoder, loss)))
    torch.testing.assert_close(found[1], found[0])


def test_recomputing_activations_works_with_caches(
    make_decoder: MakeDecoder, batches: list[Tensor]
) -> None:
    decoder = make_decoder(checkpoint_activations=True)
    caches = decoder.new_caches(3, 16)
    decoder(batches[0], caches=caches).logits.sum().backward()
    assert [cache.length for cache in caches] == [16] * decoder.n_layers


def train(decoder: Decoder, batches: Iterable[Tensor], autocast: bool) -> float:
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    losses = []
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = decoder(batch)
        assert output.logits.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert {r.probs.dtype for r in output.routings.experts if r} == {torch.float32}
        loss = language_loss(output, batch) + 0.01 * mutual_information(output)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    return sum(losses[-10:]) / 10


def test_half_precision_trains_like_float32(
    make_decoder: MakeDecoder, batches: list[Tensor]
) -> None:
    decoder = make_decoder(dropout=0.0)
    twin = copy.deepcopy(decoder)
    full = train(decoder, islice(batches, 25), autocast=False)
    half = train(twin, islice(batches, 25), autocast=True)
    assert half == pytest.approx(full, rel=0.02)


def test_copies_pickles_and_state_dicts_are_the_same_model(
    make_decoder: MakeDecoder, decoder: Decoder, batches: list[Tensor]
) -> None:
    expected = decoder(batches[0]).logits
    loaded = make_decoder().eval()
    loaded.load_state_dict(decoder.state_dict())
    for twin in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder)), loaded):
        assert torch.equal(twin(batches[0]).logits, expected)
        tied = twin.head.weight is twin.embedding.weight
        assert tied == decoder.tie_embeddings


def test_materialised_from_the_meta_device_it_starts_like_any_other(
    make_decoder: MakeDecoder, batches: list[Tensor]
) -> None:
    with torch.device("meta"):
        decoder = make_decoder()
    assert decoder(batches[0].to("meta")).logits.shape[:2] == (3, 16)
    decoder.to_empty(device="cpu")
    for module in decoder.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.reset_parameters()
    assert (decoder.head.weight is decoder.embedding.weight) == decoder.tie_embeddings
    usual = make_decoder()
    assert decoder.state_dict().keys() == usual.state_dict().keys()
    for name, weight in usual.named_parameters():
        found = decoder.get_parameter(name)
        spread = 0.0 if weight.numel() < 2 else weight.std().item()
        tolerance = 0.1 + 3 / weight.numel() ** 0.5
        assert found.std().item() == pytest.approx(spread, rel=tolerance), name
        assert found.mean().item() == pytest.approx(weight.mean().item(), abs=spread / 2), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
def test_dense_path_compiles_whole(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder(dropout=0.0)
    decoder.blocks, decoder.n_layers = decoder.blocks[:1], 1
    counter = CompileCounter()
    compiled: nn.Module = torch.compile(decoder, fullgraph=True, backend=counter)
    for length in (7, 16, 64):
        tokens = torch.randint(97, (2, length))
        output, expected = compiled(tokens), decoder(tokens)
        torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        gradients(decoder, output.logits.square().sum()),
        gradients(decoder, expected.logits.square().sum()),
        atol=1e-4,
        rtol=1e-4,
    )
    assert counter.frame_count <= 3
