"""A selection for every layer: the unit of sparse inference."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from reprlib import repr as short_repr
from typing import Annotated, Any, Self

from lightning_dsmoe.files import read_json, write_text
from lightning_dsmoe.reading import MAX_LAYERS, Bounds, check_json, check_version
from lightning_dsmoe.routing.selection import WORDS, AllExperts, Selection, check_selection

FORMAT_VERSION = 1
_SELECTIONS = Annotated[list[dict[str, Any]], Bounds(1, MAX_LAYERS)]
_FIELDS = {"format_version": int, "experts": _SELECTIONS, "attention": _SELECTIONS}


@dataclass(frozen=True)
class SelectionPlan:
    """Which experts run in every layer, for the feed-forward and for the attention experts.

    Args:
        experts: one selection per layer for the feed-forward experts.
        attention: one selection per layer for the attention experts.

    Raises:
        ValueError: if the two do not cover the same number of layers.
        TypeError: if one of them is no selection.
    """

    experts: tuple[Selection, ...]
    attention: tuple[Selection, ...]

    def __post_init__(self) -> None:
        if not self.experts or len(self.experts) != len(self.attention):
            raise ValueError(
                "a plan needs one selection per layer for experts and for attention, "
                f"got {len(self.experts)} and {len(self.attention)}"
            )
        for selection in (*self.experts, *self.attention):
            check_selection(selection)

    @classmethod
    def uniform(
        cls,
        n_layers: int,
        *,
        experts: Selection = AllExperts(),
        attention: Selection = AllExperts(),
    ) -> Self:
        """The same selections in each of `n_layers` layers; by default the dense model."""
        return cls((experts,) * n_layers, (attention,) * n_layers)

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.experts)

    def check(
        self, n_experts: Sequence[int | None], n_attention_experts: Sequence[int | None]
    ) -> None:
        """Raise a ValueError if this plan does not fit a model.

        Args:
            n_experts: feed-forward experts of each layer, None for a layer without a router.
            n_attention_experts: the same for the attention experts.
        """
        if len(n_experts) != self.n_layers:
            raise ValueError(f"a plan of {self.n_layers} layers, a model of {len(n_experts)}")
        for kind, selections, counts in (
            ("experts", self.experts, n_experts),
            ("attention", self.attention, n_attention_experts),
        ):
            for layer, (selection, count) in enumerate(zip(selections, counts, strict=True)):
                try:
                    if count is not None:
                        selection.check(count)
                except ValueError as error:
                    raise ValueError(f"plan, layer {layer}, {kind}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "experts": [_selection_to_dict(s) for s in self.experts],
            "attention": [_selection_to_dict(s) for s in self.attention],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read what `to_dict` wrote; only selections already defined are looked up.

        Raises:
            ValueError: for anything else.
        """
        check_version("the plan", data, FORMAT_VERSION)
        check_json("the plan", data, _FIELDS)
        both = data["experts"], data["attention"]
        return cls(*(tuple(map(_selection_from_dict, selections)) for selections in both))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan from JSON.

        Raises:
            ValueError: if the file is not a plan.
        """
        data = read_json(Path(path))
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def check_plan(plan: object, n_layers: int) -> None:
    """Raise a TypeError that names what was meant, unless it is a plan."""
    if not isinstance(plan, SelectionPlan):
        raise TypeError(
            f"a plan holds a selection for each layer, such as SelectionPlan.uniform({n_layers}, "
            f"experts=TopK(2)); got {plan!r:.80}"
        )


def describe(plan: SelectionPlan) -> str:
    """A plan in words.

    Examples:
        >>> from lightning_dsmoe.routing import SelectionPlan, Threshold, TopK
        >>> describe(SelectionPlan.uniform(8, experts=Threshold(0.5), attention=TopK(2)))
        'experts: threshold 0.5; attention: top 2'
    """
    experts, attention = map(describe_selections, (plan.experts, plan.attention))
    return f"experts: {experts}; attention: {attention}"


def describe_selections(selections: Sequence[Selection]) -> str:
    """The selections of all layers in words, to three significant digits.

    Examples:
        >>> from lightning_dsmoe.routing import AllExperts, Threshold
        >>> describe_selections([Threshold(0.25), Threshold(0.5)])
        'threshold 0.25 to 0.5 by layer'
        >>> describe_selections([AllExperts(), Threshold(0.25), Threshold(0.5)])
        'all in 1 layer, threshold 0.25 to 0.5 in 2 layers'
    """
    kinds: dict[tuple[str, str], list[Any]] = {}
    for selection in selections:
        # One of the user's own says its options itself.
        name = WORDS.get(type(selection), str(selection))
        options = asdict(selection) if type(selection) in WORDS else {}
        ending = "renormalized" if options.pop("renormalize", False) else ""
        kinds.setdefault((name, ending), []).append(next(iter(options.values()), None))
    words = []
    for (name, ending), values in kinds.items():
        ends = [] if values[0] is None else sorted({min(values), max(values)})
        place = "by layer" if len(ends) > 1 else ""
        if len(kinds) > 1:
            place = f"in {len(values)} layer{'s' * (len(values) > 1)}"
        span = " to ".join(f"{e:.3g}" if isinstance(e, float) else str(e) for e in ends)
        words.append(" ".join(filter(None, (name, span, ending, place))))
    return ", ".join(words)


def _known_selections(base: type[Selection] = Selection) -> dict[str, type[Selection]]:
    found = {}
    for subclass in base.__subclasses__():
        found[subclass.__name__] = subclass
        found |= _known_selections(subclass)
    return found


def _selection_to_dict(selection: Selection) -> dict[str, Any]:
    return {"selection": type(selection).__name__, **asdict(selection)}


def _selection_from_dict(data: dict[str, Any]) -> Selection:
    known = _known_selections()
    options = dict(data)
    name = options.pop("selection", None)
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"{short_repr(data)} is not a selection; known are {', '.join(sorted(known))}; to use "
            "your own, import its module first, with --import MODULE on the command line"
        )
    try:
        return known[name](**options)
    except TypeError as error:
        raise ValueError(f"{short_repr(data)} is not a selection: {error}") from None
