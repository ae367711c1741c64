"""Directories that the own class of transformers loads, with its code beside the weights."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.hugging_face.export_directory import (
    SIGNATURE,
    check_replaceable,
    replaced_directory,
)
from lightning_dsmoe.hugging_face.own_class.describe import own_config
from lightning_dsmoe.hugging_face.stock_config import TOKEN_IDS
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.serialization.shards import Part, write_shards
from lightning_dsmoe.tokenizers import Tokenizer

CODE = ("configuration_dsmoe.py", "modeling_dsmoe.py")
_MAX_POSITIONS = 2048
"""The context in the configuration of models without learned positions, which have no limit."""
_NAMES = (  # of the decoder, and of the own class
    (r"^embedding\.", "model.embed_tokens."),
    (r"^positions\.", "model.embed_positions."),
    (r"^norm\.", "model.norm."),
    (r"^head\.", "lm_head."),
    (r"^blocks\.", "model.layers."),
    (r"\.(attention|feed_forward)\.router\.", r".\1.mixture.router."),
    (r"\.attention\.heads\.", ".attention."),
    (r"\.shared\.experts\.", ".shared."),
    (r"\.(w_q|w_o|w_in|w_out)\.weight$", r".\1"),
)


def write_own_class(
    decoder: Decoder,
    plan: SelectionPlan,
    directory: Path | str,
    *,
    tokenizer: dict[str, Any] | None = None,
    token_ids: dict[str, int] | None = None,
) -> None:
    """Write a decoder under a plan as a directory with the code of its class for transformers.

    `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` loads it where
    lightning_dsmoe is not installed. Weights are those of the decoder, bit by bit.

    Args:
        decoder: the decoder.
        plan: the experts that run in each layer; the directory holds it.
        directory: where to write; an earlier export there is replaced.
        tokenizer: what `Tokenizer.to_dict` gives, to check that it fits the vocabulary; its files
            are written by `export_hf`.
        token_ids: numbers of `bos_token_id`, `eos_token_id` and `pad_token_id`, as far as known.

    Raises:
        FileExistsError: if the directory holds anything else than an earlier export.
        ValueError: if the own class cannot hold the decoder or the plan, or tokens do not fit, with
            all reasons; nothing is written then.

    Examples:
        >>> from functools import partial
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts
        >>> from lightning_dsmoe import SelectionPlan, Threshold, TopK
        >>> heads = partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=4)
        >>> experts = partial(MixtureOfExperts, n_experts=4, d_expert=6)
        >>> decoder = Decoder(8, 8, n_layers=1, attention=heads, feed_forward=experts)
        >>> plan = SelectionPlan(experts=Threshold(0.5), attention=TopK(1))
        >>> with TemporaryDirectory() as folder:
        ...     write_own_class(decoder, plan, folder)
        ...     sorted(path.name for path in Path(folder).iterdir())[:2]
        ['config.json', 'configuration_dsmoe.py']
    """
    path = Path(directory)
    check_replaceable(path)
    fields, problems = own_config(decoder, plan)
    token_ids = dict(token_ids or {})
    problems += _wrong_tokens(decoder, tokenizer, token_ids)
    if problems:
        raise ValueError(f"the own class cannot hold this decoder: {'; '.join(problems)}")
    context = decoder.max_positions or _MAX_POSITIONS
    config = {
        "architectures": ["DSMoEForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_dsmoe.DSMoEConfig",
            "AutoModel": "modeling_dsmoe.DSMoEModel",
            "AutoModelForCausalLM": "modeling_dsmoe.DSMoEForCausalLM",
        },
        "model_type": "dsmoe",
        "dtype": str(decoder.embedding.weight.dtype).removeprefix("torch."),
        **SIGNATURE,
        "max_position_embeddings": context,
        **{name: token_ids.get(name) for name in TOKEN_IDS},
        **fields,
    }
    parts = [_part(name, tensor) for name, tensor in own_tensors(decoder).items()]
    with replaced_directory(path) as folder:
        for name in CODE:
            shutil.copyfile(Path(__file__).with_name(name), folder / name)
        write_shards(folder, parts)
        ids = {name: token_ids.get(name) for name in TOKEN_IDS}
        _write_json(folder / "generation_config.json", ids)
        _write_json(folder / "config.json", config)


def own_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """The weights of a decoder by the names of the own class; a tied head is left out."""
    tensors = {}
    for name, tensor in decoder.state_dict().items():
        if name == "head.weight" and decoder.tie_embeddings:
            continue
        for ours, theirs in _NAMES:
            name = re.sub(ours, theirs, name)
        tensors[name] = tensor
    return tensors


def _wrong_tokens(
    decoder: Decoder, tokenizer: dict[str, Any] | None, token_ids: dict[str, int]
) -> list[str]:
    problems = [
        f"{name}={number} is not one of {', '.join(TOKEN_IDS)} from 0 to {decoder.vocab_size - 1}"
        for name, number in token_ids.items()
        if name not in TOKEN_IDS or not 0 <= number < decoder.vocab_size
    ]
    if tokenizer is not None:
        try:
            size = Tokenizer.from_dict(tokenizer).vocab_size
        except ValueError as error:
            return [*problems, f"tokenizer: {error}"]
        if size > decoder.vocab_size:
            problems.append(
                f"the tokenizer has {size} tokens, the decoder only {decoder.vocab_size}"
            )
    return problems


def _part(name: str, tensor: Tensor) -> Part:
    return Part({name: tensor.to("meta")}, lambda: [tensor])


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
