"""Directories of models that `from_pretrained` of transformers reads."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_dsmoe.finite import check_finite
from lightning_dsmoe.hugging_face.card import export_card
from lightning_dsmoe.hugging_face.export_directory import (
    SIGNATURE,
    check_replaceable,
    replaced_directory,
)
from lightning_dsmoe.hugging_face.export_source import ExportSource, export_source
from lightning_dsmoe.hugging_face.own_class.describe import own_config
from lightning_dsmoe.hugging_face.own_class.write import write_own_class
from lightning_dsmoe.hugging_face.own_model import source_field
from lightning_dsmoe.hugging_face.stock_config import TOKEN_IDS, stock_config
from lightning_dsmoe.hugging_face.stock_tensors import stock_parts
from lightning_dsmoe.hugging_face.targets import OWN_CLASS, StockClass, Target, choose
from lightning_dsmoe.hugging_face.tokenizer_files import adds_special_tokens, tokenizer_files
from lightning_dsmoe.inference.artifact.hashes import CARD, FRONTIER
from lightning_dsmoe.inference.text import example_prompt
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.serialization.checkpoint import LoadedDecoder
from lightning_dsmoe.serialization.shards import write_shards
from lightning_dsmoe.tokenizers import Tokenizer

DEFAULT_CONTEXT = 2048
"""Where no one knows how long the texts of training were; rotary positions have no limit."""


def export_hf(
    model: nn.Module | LoadedDecoder,
    directory: str | Path,
    *,
    to: Target = "auto",
    plan: SelectionPlan | None = None,
    tokenizer: Tokenizer | dict[str, Any] | None = None,
    token_ids: Mapping[str, int] | None = None,
    certificate: dict[str, Any] | None = None,
    frontier: str | Path | None = None,
    on_bytes: Callable[[int, int], None] = lambda written, total: None,
) -> str:
    """Write a model as a directory that `from_pretrained` of transformers reads.

    It computes what the model computes under the plan, or nothing is written. A stock class of
    transformers has one number of experts for all tokens and layers; other plans, mixtures of
    attention heads with raw gates and routers of your own go to a class of this library, which the
    directory brings along. 8-bit weights are written as the floating-point numbers that they
    compute with.

    Args:
        model: a `Decoder`, `DSMoELanguageModel` or `SparseModel`; it is not changed.
        directory: where to write; an earlier export there is replaced.
        to: `model_type` of a stock class; "dsmoe" for the class of this library; "auto" for the
            first stock class that is exact, or else that one.
        plan: the experts that run; None takes that of the model, by default all experts.
        tokenizer: the tokenizer or its description; None takes that of a sparse model.
        token_ids: numbers of special tokens under `bos_token_id`, `eos_token_id`, `pad_token_id`.
        certificate: measurements of the model under this plan, for its card.
        frontier: a picture of loss against active share, for its card.
        on_bytes: called with the bytes of weights that are written, and all of them.

    Returns:
        The `model_type` of the class.

    Raises:
        FileExistsError: if the directory holds anything else than an earlier export.
        ValueError: if the class would compute something else, which lists every reason, a weight
            is not finite, or tokenizer or plan do not fit the model.
        TypeError: if the model is none of these.

    Examples:
        >>> from functools import partial
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_dsmoe import Decoder, GLUExperts, GroupedQueryAttention
        >>> from lightning_dsmoe import MixtureOfExperts, SelectionPlan, TopK, export_hf
        >>> attention = partial(GroupedQueryAttention, n_heads=4, n_kv_heads=2, d_head=8)
        >>> swiglu = partial(GLUExperts, activation="silu")
        >>> experts = partial(MixtureOfExperts, n_experts=4, d_expert=8, experts=swiglu)
        >>> decoder = Decoder(256, 32, 2, attention=attention, feed_forward=experts)
        >>> plan = SelectionPlan(experts=TopK(2, renormalize=True))
        >>> with TemporaryDirectory() as folder:
        ...     export_hf(decoder, f"{folder}/mixtral", plan=plan)
        'mixtral'
    """
    path = Path(directory)
    check_replaceable(path)
    source = export_source(model)
    plan = source.plan if plan is None else plan
    if isinstance(tokenizer, Tokenizer):
        tokenizer = dict(tokenizer.to_dict())
    source = source._replace(plan=plan, tokenizer=tokenizer or source.tokenizer)
    stock = _checked(source, to, dict(token_ids or {}))
    with replaced_directory(path) as folder:
        if stock is None:
            _write_own(folder, source, token_ids or {})
        else:
            _write_stock(folder, stock, source, token_ids or {}, on_bytes)
        notes = _write_tokenizer(folder, source)
        if frontier is not None:
            shutil.copyfile(frontier, folder / FRONTIER)
        prompt = example_prompt(source.tokenizer) if (folder / "tokenizer.json").exists() else None
        card = export_card(
            source,
            stock,
            certificate or {},
            notes,
            prompt=prompt,
            frontier=frontier is not None,
        )
        (folder / CARD).write_text(card, encoding="utf-8")
    return OWN_CLASS if stock is None else stock.model_type


def _checked(source: ExportSource, to: Target, token_ids: Mapping[str, int]) -> StockClass | None:
    """The class to write, after all checks; raises one ValueError with all problems."""
    stock, problems = None, []
    try:
        stock = choose(source.decoder, source.plan, to)
    except ValueError as error:
        problems.append(str(error))
    if stock is None and not problems:
        problems = own_config(source.decoder, source.plan).problems
    try:
        check_finite(source.decoder.state_dict())
    except ValueError as error:
        problems.append(str(error))
    size = source.decoder.vocab_size
    if unknown := sorted(set(token_ids) - set(TOKEN_IDS)):
        problems.append(f"token_ids may have {', '.join(TOKEN_IDS)}, got {', '.join(unknown)}")
    problems += [
        f"{name} must be from 0 to {size - 1}, got {number}"
        for name, number in token_ids.items()
        if not 0 <= number < size
    ]
    try:
        tokenizer = None if source.tokenizer is None else Tokenizer.from_dict(source.tokenizer)
        if tokenizer is not None and tokenizer.vocab_size > size:
            problems.append(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {size}: it "
                "belongs to another model"
            )
    except ValueError as error:
        problems.append(f"tokenizer: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return stock


def _write_stock(
    folder: Path,
    stock: StockClass,
    source: ExportSource,
    token_ids: Mapping[str, int],
    on_bytes: Callable[[int, int], None],
) -> None:
    config = stock_config(
        stock,
        source.decoder,
        source.plan,
        dtype=source.decoder.embedding.weight.dtype,
        context_length=source.context_length or DEFAULT_CONTEXT,
        token_ids=token_ids,
    )
    _write_json(folder / "config.json", config | SIGNATURE)
    _write_json(folder / "generation_config.json", {n: token_ids.get(n) for n in TOKEN_IDS})
    parts = list(stock_parts(stock, source.decoder))
    total, written = sum(part.n_bytes for part in parts), 0

    def add(n_bytes: int) -> None:
        nonlocal written
        written += n_bytes
        on_bytes(written, total)

    write_shards(folder, parts, on_bytes=add)


def _write_own(folder: Path, source: ExportSource, token_ids: Mapping[str, int]) -> None:
    """The class of this library, whose code goes along."""
    write_own_class(
        source.decoder,
        source.plan,
        folder,
        tokenizer=source.tokenizer,
        token_ids=dict(token_ids),
    )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= source_field(source.decoder, source.plan)
    if source.context_length is not None:
        config["max_position_embeddings"] = source.context_length
    _write_json(folder / "config.json", config)


def _write_tokenizer(folder: Path, source: ExportSource) -> list[str]:
    """The files of the tokenizer, and what a reader of the card has to know of them."""
    if source.tokenizer is None:
        return ["There is no tokenizer: the model was saved without one."]
    tokenizer = Tokenizer.from_dict(source.tokenizer)
    try:
        files = tokenizer_files(tokenizer, source.context_length or DEFAULT_CONTEXT)
    except ValueError as error:
        return [f"The tokenizer is left out: {error}."]
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    if not adds_special_tokens(tokenizer):
        return []
    return [
        "The tokenizer adds special tokens to a text. In generation so does lightning_dsmoe, in "
        "training not: a model trained there may do better with `add_special_tokens=False`."
    ]


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
