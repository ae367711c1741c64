"""What a training step of a model consists of, counted on tensors without memory.

Shapes: B sequences, T positions.
"""

from collections.abc import Callable
from importlib.resources import files
from math import prod
from typing import Any, NamedTuple

import jsonargparse
import torch
import yaml
from torch import Tensor, nn

import lightning_dsmoe.schedules  # noqa: F401 - the configurations name it
from lightning_dsmoe import DSMoELanguageModel
from lightning_dsmoe.callbacks.step_flops import StepFlops
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.routing import SelectionPlan, routed_layers
from lightning_dsmoe.torch_private import fake_tensors
from lightning_dsmoe.training.objective import Step, objective

VOCABULARY = 50257
"""GPT-2's; the paper does not tell its own."""


class Counts(NamedTuple):
    """A model and its batches, in numbers.

    Args:
        name: what it is called.
        units: shapes of the parameters that FSDP2 gathers together: those outside of the blocks,
            then those of each block.
        router_sums: numbers that all ranks add up in each batch: those of the routers' losses, and
            of the cross entropy.
        flops: of the model in forward and backward pass, for a batch.
        recomputed_flops: of a forward pass of the blocks.
        kept: bytes of the activations that a batch keeps for its backward pass.
        kept_checkpointed: the same where blocks are recomputed, with one block's at a time.
        batch_size: sequences B in a batch of one GPU.
        context: positions T.
        accumulate: batches of an optimizer step on one GPU.
    """

    name: str
    units: list[list[torch.Size]]
    router_sums: int
    flops: float
    recomputed_flops: float
    kept: float
    kept_checkpointed: float
    batch_size: int
    context: int
    accumulate: int

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(prod(shape) for unit in self.units for shape in unit)


def paper_counts(size: str, batch_size: int | None = None) -> Counts:
    """Count the configuration `cli_configs/paper/dsmoe_SIZE.yaml`, in bfloat16 mixed precision.

    Args:
        size: "1b", "3b" or "6b".
        batch_size: sequences in a batch of one GPU; None for the configuration's.
    """
    path = files("lightning_dsmoe.cli_configs").joinpath(f"paper/dsmoe_{size}.yaml")
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(DSMoELanguageModel, "model")

    def make(**options: Any) -> DSMoELanguageModel:
        chosen = {**config["model"]["init_args"], "vocab_size": VOCABULARY, **options}
        given = {"class_path": config["model"]["class_path"], "init_args": chosen}
        model: DSMoELanguageModel = parser.instantiate(parser.parse_object({"model": given})).model
        return model

    data = config["data"]["init_args"]
    batch_size = batch_size or data["batch_size"]
    sequences = config["trainer"]["accumulate_grad_batches"] * data["batch_size"]
    return count(
        f"DS-MoE-{size.upper()}",
        make,
        n_layers=config["model"]["init_args"]["n_layers"],
        batch_size=batch_size,
        context=data["context"],
        accumulate=max(1, sequences // batch_size),
    )


def count(
    name: str,
    make: Callable[..., DSMoELanguageModel],
    *,
    n_layers: int,
    batch_size: int,
    context: int,
    accumulate: int = 1,
) -> Counts:
    """Count a model whose blocks are all alike.

    Args:
        name: what it is called.
        make: makes it, called with `n_layers` and `checkpoint_activations`.
        n_layers: number of blocks.
        batch_size: sequences in a batch.
        context: positions.
        accumulate: batches of an optimizer step.
    """
    with torch.device("meta"):
        units = fsdp_units(make(n_layers=n_layers, checkpoint_activations=False).decoder)
        model = make(n_layers=n_layers, checkpoint_activations=False)
    # What one block adds is the difference of two and one; the rest belongs to embeddings and head.
    one, two = (_step(make, number, False, batch_size, context) for number in (1, 2))
    once, twice = (_step(make, number, True, batch_size, context) for number in (1, 2))
    block_flops, block_kept = two.flops - one.flops, two.kept - one.kept
    return Counts(
        name,
        units,
        router_sums(model),
        one.flops + (n_layers - 1) * block_flops,
        n_layers * block_flops / 3,
        one.kept + (n_layers - 1) * block_kept,
        once.kept + (n_layers - 1) * (twice.kept - once.kept) + block_kept,
        batch_size,
        context,
        accumulate,
    )


def fsdp_units(decoder: Decoder) -> list[list[torch.Size]]:
    """Shapes of the parameters by what `strategies.shard` gathers together, tied ones once."""
    blocks = [list(block.parameters()) for block in decoder.blocks]
    inside = {id(parameter) for block in blocks for parameter in block}
    outside = [each for each in decoder.parameters() if id(each) not in inside]
    return [[each.shape for each in unit] for unit in (outside, *blocks)]


def router_sums(model: DSMoELanguageModel) -> int:
    """Numbers that ranks add up in a batch: `RouterSums`, and the total and count of tokens."""
    loss, total = model.routing_loss, 2
    for layer in routed_layers(model.decoder).values():
        total += 2 + layer.n_experts
        total += layer.n_experts if loss.load_balancing else 0
        total += 1 if loss.router_z else 0
    return total


class _Counted(NamedTuple):
    flops: float
    kept: float


def _step(
    make: Callable[..., DSMoELanguageModel], n_layers: int, recompute: bool, b: int, t: int
) -> _Counted:
    """Operations of a step and bytes that it keeps, without computing anything."""
    with torch.device("meta"):
        model = make(n_layers=n_layers, checkpoint_activations=recompute)
    with fake_tensors(), torch.autocast("cpu", torch.bfloat16):
        _put_on_cpu(model.decoder)
        tokens_BT = torch.zeros(b, t, dtype=torch.long)
        batch, plan = {"input_ids": tokens_BT, "labels": tokens_BT}, SelectionPlan()
        flops = StepFlops()
        flops.open()
        kept = KeptBytes(model.decoder)
        with kept:
            total, _ = objective(Step.of(model, batch, plan), model.routing_loss)
        flops.before_backward()
        total.backward()
        flops.after_backward()
        return _Counted(flops.close(), kept.total)


def _put_on_cpu(model: nn.Module) -> None:
    """Give a model on the meta device tensors that say to be on a CPU, as autocast wants."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, tensor in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ):
            if id(tensor) not in made:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(empty) if is_parameter else empty
            setattr(module, name, made[id(tensor)])


class KeptBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the storages that autograd keeps in the block, but for those of parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {_identity(parameter) for parameter in model.parameters()}
        self._storages: dict[int, torch.UntypedStorage] = {}
        super().__init__(self._note, lambda tensor: tensor)

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def _note(self, tensor: Tensor) -> Tensor:
        if _identity(tensor) not in self._parameters:
            # Kept alive, so that no other storage gets its address.
            self._storages[_identity(tensor)] = tensor.untyped_storage()
        return tensor


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
