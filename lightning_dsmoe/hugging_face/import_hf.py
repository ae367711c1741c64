"""Models of transformers as decoders.

Shapes: E experts, F hidden units of one expert, D width.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.finite import check_finite
from lightning_dsmoe.hugging_face.config_file import read_config
from lightning_dsmoe.hugging_face.matching import (
    StoredParts,
    check_size,
    check_tied_head,
    common_dtype,
    files_of,
    matched,
)
from lightning_dsmoe.hugging_face.multipliers import fold
from lightning_dsmoe.hugging_face.neuron_order import split_by_activations, split_by_weights
from lightning_dsmoe.hugging_face.own_model import OwnModel, read_own_model
from lightning_dsmoe.hugging_face.source_model import SourceModel, build, check_n_experts
from lightning_dsmoe.hugging_face.weight_map import FAMILIES
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.serialization.tensor_files import stored_tensors

Split = Literal["contiguous", "weights", "activations"]
Progress = Callable[[int, int], None]
"""Called with the tensors that are read, and all of them."""


def import_hf(
    directory: str | Path,
    *,
    n_experts: int | None = None,
    split: Split = "contiguous",
    tokens: Tensor | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """Read a model of transformers into a decoder that gives the same logits.

    A published mixture keeps its weights to the bit. A dense model becomes a mixture that runs all
    experts under equal gates: the neurons of a feed-forward layer are split among `n_experts`, and
    query heads that share a KV head are attention experts. Its routers are zero, so that no expert
    is preferred before training. A decoder that was exported to the class of this library comes
    back as it was.

    Tensors are read one by one, so memory holds the model and little else. Nothing that the
    directory names is imported or run, and transformers need not be installed.

    Args:
        directory: config.json and safetensors, as `save_pretrained` writes them; either layout of
            experts, one file or shards with an index.
        n_experts: experts of each feed-forward layer of a dense model, a divisor of its neurons.
        split: of a dense model: "contiguous" keeps neurons in their order, "weights" puts those of
            similar input weights together, "activations" those active for the same tokens.
        tokens: token ids `[B, T]` of a sample text, for activations.
        dtype: type of the weights; None for that of the files.
        progress: called after every tensor, with their number so far and in all.

    Returns:
        The decoder in evaluation mode, on the CPU. It runs all experts; `plan_of` gives the plan
        that a published mixture runs.

    Raises:
        FileNotFoundError: if there is no configuration, or no safetensors.
        ValueError: if the model is not supported, an option does not fit it, or a file is not whole
            or does not match; all problems at once.

    Examples:
        >>> from lightning_dsmoe.hugging_face import import_hf, plan_of
        >>> decoder = import_hf("Mixtral-8x7B-v0.1")  # doctest: +SKIP
        >>> decoder(tokens, plan_of("Mixtral-8x7B-v0.1")).logits  # doctest: +SKIP
    """
    folder = Path(directory)
    source = read_source(folder)
    _check_split(source, split, tokens)
    check_experts(source, n_experts)
    stored = stored_tensors(folder)
    check_size(source, stored)
    decoder = source.decoder if isinstance(source, OwnModel) else build(source, n_experts)
    found = matched(source, decoder, stored)
    wanted = dtype or common_dtype([stored[name] for entry in found for name in files_of(entry)])
    for number, entry in enumerate(found, start=1):
        tensor = entry.to_ours(StoredParts(entry.theirs, stored, wanted))
        check_finite({" or ".join(files_of(entry)): tensor})
        _assign(decoder, entry.ours, tensor.contiguous())
        if progress is not None:
            progress(number, len(found))
    _fill_with_zeros(decoder, wanted)
    if decoder.tie_embeddings:
        decoder.head.weight = decoder.embedding.weight
        check_tied_head(decoder, stored)
    if isinstance(source, SourceModel):
        fold(source.multipliers, decoder)
    if split == "weights":
        split_by_weights(decoder)
    elif tokens is not None:
        split_by_activations(decoder, tokens)
    return decoder


def check_experts(source: SourceModel | OwnModel, n_experts: int | None) -> None:
    """Raise a ValueError unless a number of experts fits a model, or it needs none."""
    if isinstance(source, SourceModel):
        check_n_experts(source, n_experts)
    elif n_experts is not None:
        raise ValueError(
            f"{source.family} comes back with the layers it had, n_experts is for dense models of "
            f"transformers; got n_experts={n_experts}"
        )


def _check_split(source: SourceModel | OwnModel, split: str, tokens: Tensor | None) -> None:
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r:.80}")
    if split != "contiguous" and (isinstance(source, OwnModel) or source.mixture is not None):
        raise ValueError(
            f"{source.family} has experts already, split={split!r} is for dense models"
        )
    if (split == "activations") != (tokens is not None):
        raise ValueError("split='activations' needs the tokens of a sample text, nothing else does")


def plan_of(directory: str | Path) -> SelectionPlan:
    """The plan that the configuration of a published mixture runs: its top k, for every layer.

    Args:
        directory: of the model, see `import_hf`.

    Returns:
        The plan; that of all experts for a dense model.

    Raises:
        FileNotFoundError: if there is no configuration.
        ValueError: if the model is not supported; all problems at once.
    """
    return read_source(Path(directory)).plan


def read_source(directory: Path) -> SourceModel | OwnModel:
    """Read the configuration of a directory; see `plan_of` for what is raised."""
    config = read_config(directory)
    family = config.fields.get("model_type")
    if family == "dsmoe":
        return read_own_model(config)
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(
            f"{config.name}: model_type={family!r:.80} is not supported; what is: "
            f"{', '.join(FAMILIES)}, dsmoe. `lightning_dsmoe.upcycle` makes mixtures of the "
            "feed-forward layers of any other causal model in place"
        )
    classes = config.fields.get("architectures")
    if isinstance(classes, list) and not any(
        str(name).lower().endswith(("forcausallm", "lmheadmodel")) for name in classes
    ):
        config.refuse("architectures", "a model with a language-model head, such as ...ForCausalLM")
    if config.has("quantization_config"):
        config.refuse("quantization_config", "weights that are not quantized")
    config.refuse_unless("is_causal", (True,), "true, a token attends to those before it")
    config.refuse_unless("per_layer_config", ({},), "one configuration for all layers")
    source = FAMILIES[family].read(config)
    config.finish()
    return source


def _assign(decoder: Decoder, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(decoder.get_submodule(owner), leaf, nn.Parameter(tensor))


def _fill_with_zeros(decoder: Decoder, dtype: torch.dtype) -> None:
    """Give zeros to what no file holds: routers of a dense model, biases that ours has alone."""
    for name, parameter in list(decoder.named_parameters()):
        if parameter.is_meta:
            _assign(decoder, name, torch.zeros(parameter.shape, dtype=dtype))
