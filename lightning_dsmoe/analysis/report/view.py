"""What the page shows, as plain numbers and strings for its templates.

Shapes: E experts, T tokens of the sample.
"""

import unicodedata
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lightning_dsmoe.analysis.report import lift
from lightning_dsmoe.analysis.report.drift import Drift
from lightning_dsmoe.analysis.report.sample_routing import SampleRouting
from lightning_dsmoe.analysis.report.utilization import ModelUse
from lightning_dsmoe.routing.plan import describe_selections
from lightning_dsmoe.routing.routing import Kind, block_layer_name

_TITLES: dict[Kind, str] = {"experts": "feed-forward", "attention": "attention"}
_PAIRS = 3
_LEAST_CHANGE = 0.01
_MOST_TOKENS, _LEAST_TOKENS = 8, 3
_ALL_TOKENS = 24_000
_NAMED_EXPERTS = 6
_SYMBOLS = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_DOTTED_CIRCLE = "\N{DOTTED CIRCLE}"


class Layer(NamedTuple):
    """What the page shows of a routed layer.

    Args:
        number: number of the layer.
        selection: selection of the experts that run.
        effective: effective experts, exp H(e).
        entropy: H(e) in nats.
        conditional_entropy: H(e|x) in nats.
        shares: gate share of each expert.
        dead: numbers of the dead experts.
        together: share of the tokens for which two experts both run.
        pairs: the most frequent pairs.
        tokens: the most over-represented tokens of each expert.
        changes: difference of each gate share from the other checkpoint; empty without one.
        changed: share of the tokens whose top-1 expert differs from the other checkpoint.
    """

    number: int
    selection: str
    effective: float
    entropy: float
    conditional_entropy: float
    shares: list[float]
    dead: list[int]
    together: list[list[float]]
    pairs: list[lift.ExpertPair]
    tokens: list[list[lift.TokenLift]]
    changes: list[float]
    changed: float

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return len(self.shares)

    @property
    def running(self) -> list[float]:
        """Share of the tokens for which each expert runs."""
        return [row[expert] for expert, row in enumerate(self.together)]


class KindView(NamedTuple):
    """All layers of a model, seen as one kind of experts: None where a layer has no router."""

    name: str
    layers: list[Layer | None]

    @property
    def routed(self) -> list[Layer]:
        """The routed layers."""
        return [layer for layer in self.layers if layer is not None]

    @property
    def most_share(self) -> float:
        """The largest gate share as a multiple of an even share, at least 2."""
        return max(2.0, *(max(layer.shares) * layer.n_experts for layer in self.routed))

    @property
    def most_together(self) -> float:
        """Share of the tokens for which the most frequent pair runs."""
        return max((layer.pairs[0].share for layer in self.routed if layer.pairs), default=0.0)

    @property
    def most_change(self) -> float:
        """The largest change of a gate share, at least a percentage point."""
        return max(_LEAST_CHANGE, *(abs(c) for layer in self.routed for c in layer.changes))


class SampleToken(NamedTuple):
    """A token of the sample.

    Args:
        text: what to show of it.
        ends_line: whether it contains a line break.
        n_running: number of experts that run, over all layers and both kinds.
        running: which experts run, by layer.
    """

    text: str
    ends_line: bool
    n_running: int
    running: tuple[str, ...]


def kinds_of(
    use: ModelUse,
    drift: Drift | None,
    frequent: lift.FrequentTokens,
    n_layers: int,
) -> list[KindView]:
    """The kinds of experts that a model has.

    Args:
        use: how the model uses its experts.
        drift: the difference from another checkpoint, if there is one.
        frequent: the tokens whose lift is shown.
        n_layers: number of blocks.
    """
    n_experts = sum(len(router.gates.share) for router in use.layers.values())
    most = max(_LEAST_TOKENS, min(_MOST_TOKENS, _ALL_TOKENS // n_experts))

    def layers(kind: Kind) -> Iterator[Layer | None]:
        for number in range(n_layers):
            name = block_layer_name(number, kind)
            if (router := use.layers.get(name)) is None:
                yield None
                continue
            change = None if drift is None else drift.layers[name]
            gates = router.gates
            yield Layer(
                number,
                describe_selections([use.selections[name]]),
                gates.effective.item(),
                gates.entropy.item(),
                gates.conditional_entropy.item(),
                gates.share.tolist(),
                router.dead_experts,
                router.together_EE.tolist(),
                lift.strongest_pairs(router.together_EE, _PAIRS),
                lift.over_represented(router.token_gates_UE, gates.share, frequent, most),
                [] if change is None else change.change_E.tolist(),
                0.0 if change is None else change.changed,
            )

    kinds = [KindView(f"{title} experts", list(layers(kind))) for kind, title in _TITLES.items()]
    return [kind for kind in kinds if kind.routed]


def sample_tokens(
    sample: SampleRouting, token_text: Callable[[int], str], n_layers: int
) -> Iterator[SampleToken]:
    """The tokens of a sample, with the experts that run for each.

    Args:
        sample: the sample.
        token_text: text of a token.
        n_layers: number of blocks.
    """
    running = [
        [_running(f"{title} {layer}", row_E) for row_E in sample.layers[name].tolist()]
        for kind, title in _TITLES.items()
        for layer in range(n_layers)
        if (name := block_layer_name(layer, kind)) in sample.layers
    ]
    rows = zip(sample.tokens, sample.n_running_T.tolist(), zip(*running, strict=True), strict=True)
    for token, n_running, names in rows:
        text = token_text(token)
        yield SampleToken(visible(text, token), "\n" in text, n_running, names)


def _running(name: str, row_E: list[bool]) -> str:
    """The experts of a layer that run for a token, or just their number if they are many."""
    experts = [str(expert) for expert, runs in enumerate(row_E) if runs]
    many = len(experts) > _NAMED_EXPERTS
    return f"{name}: {f'{len(experts)} of {len(row_E)}' if many else ', '.join(experts)}"


def visible(token: str, number: int) -> str:
    """A token as it is shown: spaces as symbols, or its number if it has no text of its own.

    Args:
        token: its text.
        number: its number.
    """
    if not token or _REPLACEMENT in token:
        return f"#{number}"
    shown = printable(token.translate(_SYMBOLS))
    return _DOTTED_CIRCLE + shown if unicodedata.combining(shown[0]) else shown


def printable(text: str) -> str:
    """A text in which characters that cannot be printed are replaced by their codes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
