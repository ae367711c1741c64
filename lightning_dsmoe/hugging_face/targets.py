"""Which stock class of transformers computes exactly what a decoder computes under a plan."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.hugging_face.traits import Traits, traits
from lightning_dsmoe.routing import SelectionPlan

Target = Literal[
    "auto",
    "qwen3_moe",
    "qwen2_moe",
    "mixtral",
    "olmoe",
    "granitemoe",
    "granitemoeshared",
    "jetmoe",
    "dsmoe",
]
OWN_CLASS = "dsmoe"
_NO_BIAS = (False, False)


@dataclass(frozen=True)
class StockClass:
    """What a mixture-of-experts class of transformers can compute.

    Args:
        model_type: its name in a `config.json`.
        architecture: its name in Python.
        qk_norm: the q/k norm that it has.
        biases: pairs of biases it can have: of queries, keys and values, and of the output.
        renormalizes: whether it always divides gates by their sum; if not, it can.
        shared: whether it has an expert that always runs.
        shared_gate: whether that one has a sigmoid gate.
        mixes_heads: whether its attention is a mixture.
        expert_bias: whether its experts have an output bias.
        dense_layers: whether some of its layers may be dense.
        block_eps: eps of the blocks' norms where its configuration cannot set that.
    """

    model_type: str
    architecture: str
    qk_norm: Literal[False, True, "projection"] = False
    biases: tuple[tuple[bool, bool], ...] = (_NO_BIAS,)
    renormalizes: bool = False
    shared: bool = False
    shared_gate: bool = False
    mixes_heads: bool = False
    expert_bias: bool = False
    dense_layers: bool = False
    block_eps: float | None = None


_ALL_OR_NONE = (_NO_BIAS, (True, True))
STOCK_CLASSES = (
    StockClass(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        qk_norm=True,
        biases=_ALL_OR_NONE,
        dense_layers=True,
    ),
    StockClass("olmoe", "OlmoeForCausalLM", qk_norm="projection", biases=_ALL_OR_NONE),
    StockClass("mixtral", "MixtralForCausalLM", renormalizes=True),
    StockClass("granitemoe", "GraniteMoeForCausalLM", biases=_ALL_OR_NONE, renormalizes=True),
    StockClass(
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM",
        biases=_ALL_OR_NONE,
        renormalizes=True,
        shared=True,
    ),
    StockClass(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        biases=(_NO_BIAS, (True, False)),
        shared=True,
        shared_gate=True,
        dense_layers=True,
    ),
    StockClass(
        "jetmoe",
        "JetMoeForCausalLM",
        biases=(_NO_BIAS, (False, True)),
        renormalizes=True,
        mixes_heads=True,
        expert_bias=True,
        block_eps=1e-6,
    ),
)
"""In order of preference: the plainest class that fits is the one that most tools know."""


def choose(decoder: Decoder, plan: SelectionPlan, to: Target = "auto") -> StockClass | None:
    """The stock class for a decoder under a plan, None for the class of this library.

    Args:
        decoder: the decoder.
        plan: the experts that run.
        to: the `model_type` that is wanted, or auto for the first that fits.

    Raises:
        ValueError: if there is no such class, the wanted one would compute something else, which
            lists every reason, or the plan does not fit the decoder.
    """
    if to not in get_args(Target):
        raise ValueError(f"to must be one of {', '.join(get_args(Target))}, got {to!r}")
    found = traits(decoder, plan)
    if to == OWN_CLASS:
        return None
    fitting = [stock for stock in STOCK_CLASSES if not reasons(stock, found)]
    if to == "auto":
        return fitting[0] if fitting else None
    [wanted] = [stock for stock in STOCK_CLASSES if stock.model_type == to]
    if why := reasons(wanted, found):
        others = [stock.model_type for stock in fitting] or [OWN_CLASS]
        raise ValueError(
            f"{wanted.architecture} would compute something else: {'; '.join(why)}. "
            f"What computes the same: --to {' or '.join(others)}"
        )
    return wanted


def reasons(stock: StockClass, found: Traits) -> list[str]:
    """Why a stock class does not compute the same, each with its module; none if it does."""
    return [
        *found.problems,
        *_differing(stock, found),
        *_of_attention(stock, found),
        *_of_experts(stock, found),
        *_of_norms(stock, found),
    ]


def _differing(stock: StockClass, found: Traits) -> Iterator[str]:
    """Options that are not the same in all layers, which a configuration cannot say."""
    for option, values in found.values.items():
        if len(values) > 1:
            each = ", ".join(f"{value} in {where}" for value, where in values.items())
            yield f"{option} must be the same in all layers, got {each}"


def _of_attention(stock: StockClass, found: Traits) -> Iterator[str]:
    for kind, where in found.values.get("attention", {}).items():
        if (kind == "mixture") != stock.mixes_heads:
            has = "a mixture of attention heads" if stock.mixes_heads else "plain attention"
            yield f"{where}: the attention is {kind}, {stock.model_type} has {has}"
    for norm, where in found.values.get("q/k norm", {}).items():
        if norm != stock.qk_norm:
            yield f"{where}: qk_norm={norm!r}, {stock.model_type} has {_norm_words(stock)}"
    for biases, where in found.values.get("biases", {}).items():
        if biases not in stock.biases:
            yield (
                f"{where}: bias={biases[0]}, output_bias={biases[1]}, {stock.model_type} has "
                f"{' or '.join(f'{a} and {b}' for a, b in stock.biases)}"
            )
    if stock.qk_norm == "projection":  # its norm is as wide as the model
        for channels, where in found.values.get("channels of all heads", {}).items():
            if channels != (d_model := found.the("d_model")):
                yield f"{where}: heads of {channels} channels, {stock.model_type} has {d_model}"
    if stock.mixes_heads:
        for option in ("", " that run"):
            counts = {
                **found.values.get(f"attention experts{option}", {}),
                **found.values.get(f"experts{option}", {}),
            }
            if len(counts) > 1:
                each = ", ".join(f"{count} in {where}" for count, where in counts.items())
                yield f"{stock.model_type} has one number of experts{option}, got {each}"


def _norm_words(stock: StockClass) -> str:
    if not stock.qk_norm:
        return "none"
    return "one over each head" if stock.qk_norm is True else "one over the whole projection"


def _of_experts(stock: StockClass, found: Traits) -> Iterator[str]:
    if not stock.dense_layers:
        for name in found.dense.values():
            yield f"{name} is a FeedForward, {stock.model_type} has a router in every layer"
    for kind in ("experts", "attention experts"):
        where = found.values.get(f"gates of {kind}", {}).get("raw")
        if where is not None and stock.renormalizes:
            yield (
                f"{where}: the gates of fewer than all experts are raw, {stock.model_type} divides "
                "them by their sum (renormalize=True)"
            )
    for width, where in found.values.get("d_shared", {}).items():
        if width and not stock.shared:
            yield f"{where}: d_shared={width}, {stock.model_type} has no shared expert"
    where = found.values.get("shared gate", {}).get(True)
    if where is not None and stock.shared and not stock.shared_gate:
        yield f"{where}: shared_gate=True, {stock.model_type} has no gate of the shared expert"

    for biases, where in found.values.get("biases of experts", {}).items():
        if biases not in ("none", *["output"] * stock.expert_bias):
            has = "output biases" if stock.expert_bias else "no biases"
            yield f"{where}: bias=True, {biases} biases; experts of {stock.model_type} have {has}"


def _of_norms(stock: StockClass, found: Traits) -> Iterator[str]:
    """A class has one `rms_norm_eps`, or a fixed one in its blocks."""
    wanted = next(iter(found.values.get("eps", ())), None)
    if stock.block_eps is not None:
        wanted = stock.block_eps
    for option in ("block eps", "q/k eps"):
        for value, where in found.values.get(option, {}).items():
            if wanted is not None and value != wanted:
                yield f"{where}: eps={value:.8g}, {stock.model_type} has {wanted:.8g} there"
