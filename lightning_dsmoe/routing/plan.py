"""A selection for every routed layer of a model: the unit of sparse inference."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from reprlib import repr as short_repr
from types import MappingProxyType
from typing import Annotated, Any, Protocol, Self

from lightning_dsmoe.files import read_json, write_text
from lightning_dsmoe.moved import warn_renamed
from lightning_dsmoe.reading import MAX_LAYERS, Bounds, ShortText, check_json, check_version
from lightning_dsmoe.routing.routing import Kind, block_layer_name
from lightning_dsmoe.routing.selection import WORDS, AllExperts, Selection, check_selection

FORMAT_VERSION = 2
_BLOCK_FORMAT_VERSION = 1
_SELECTIONS = Annotated[list[dict[str, Any]], Bounds(1, MAX_LAYERS)]
_FIELDS: dict[int, dict[str, Any]] = {
    _BLOCK_FORMAT_VERSION: {"experts": _SELECTIONS, "attention": _SELECTIONS},
    FORMAT_VERSION: {"experts": dict, "attention": dict, "layers": dict},
}


class PlannedLayer(Protocol):
    """What a plan has to know of a routed layer."""

    @property
    def kind(self) -> Kind:
        """Whose default holds for it."""

    @property
    def n_experts(self) -> int:
        """Number of its experts."""


@dataclass(frozen=True)
class SelectionPlan:
    """Which experts run in every routed layer: defaults by the kind of layer, exceptions by name.

    A plan fits any model. A name is that of `routed_layers(model)`, or either ends with the other
    from a dot on, so that a plan for a model fits a module that has this model as an attribute, and
    the other way round.

    Args:
        experts: selection of the feed-forward experts.
        attention: selection of the attention experts.
        layers: selections of layers that differ, by their names.

    Raises:
        TypeError: if one of them is no selection.

    Examples:
        >>> from lightning_dsmoe import AllExperts, SelectionPlan, Threshold, TopK
        >>> plan = SelectionPlan(experts=TopK(3), layers={"blocks.0.feed_forward": AllExperts()})
        >>> plan.experts, plan.attention
        (TopK(renormalize=False, k=3), AllExperts(renormalize=False))
        >>> SelectionPlan() == SelectionPlan(experts=AllExperts())  # the dense model
        True
    """

    experts: Selection = AllExperts()
    attention: Selection = AllExperts()
    layers: Mapping[str, Selection] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in (self.experts, self.attention):
            if isinstance(kind, tuple | list):
                raise TypeError(
                    "a plan has one selection for each kind of expert, and `layers` for layers "
                    f"that differ, by name; got {len(kind)} selections"
                )
        if not isinstance(self.layers, Mapping) or not all(isinstance(n, str) for n in self.layers):
            raise TypeError(f"layers must map names to selections, got {self.layers!r:.80}")
        for selection in (self.experts, self.attention, *self.layers.values()):
            check_selection(selection)
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def __hash__(self) -> int:
        return hash((self.experts, self.attention, frozenset(self.layers.items())))

    @classmethod
    def of_blocks(cls, experts: Sequence[Selection], attention: Sequence[Selection]) -> Self:
        """The plan of a `Decoder` with these selections in its blocks.

        Args:
            experts: selection of the feed-forward experts of each block.
            attention: selection of the attention experts of each block.

        Raises:
            ValueError: if the two do not cover the same number of blocks.
        """
        if not experts or len(experts) != len(attention):
            raise ValueError(
                "a plan needs one selection per layer for experts and for attention, "
                f"got {len(experts)} and {len(attention)}"
            )
        kinds: tuple[tuple[Kind, Sequence[Selection]], ...] = (
            ("experts", experts),
            ("attention", attention),
        )
        return cls.of_layers(
            {
                block_layer_name(block, kind): (kind, selection)
                for kind, selections in kinds
                for block, selection in enumerate(selections)
            }
        )

    @classmethod
    def of_layers(cls, layers: Mapping[str, tuple[Kind, Selection]]) -> Self:
        """The shortest plan with these selections: the most frequent of a kind is its default.

        Args:
            layers: kind and selection of each layer, by its name.
        """
        defaults = {}
        for kind in ("experts", "attention"):
            counts = Counter(selection for of_kind, selection in layers.values() if of_kind == kind)
            defaults[kind] = max(counts, key=counts.__getitem__, default=AllExperts())
        others = {n: each for n, (kind, each) in layers.items() if each != defaults[kind]}
        return cls(**defaults, layers=others)

    @classmethod
    def uniform(
        cls,
        n_layers: int,
        *,
        experts: Selection = AllExperts(),
        attention: Selection = AllExperts(),
    ) -> Self:
        """Old name of `SelectionPlan(experts=…, attention=…)`, until version 0.3."""
        del n_layers
        warn_renamed("SelectionPlan.uniform(n_layers, …)", "SelectionPlan(experts=…, attention=…)")
        return cls(experts, attention)

    def selections(self, layers: Mapping[str, PlannedLayer]) -> dict[str, Selection]:
        """The selection of each layer.

        Args:
            layers: routed layers by name, as `routed_layers(model)` gives them.

        Raises:
            ValueError: if this plan names a layer that is not there or is several, or a selection
                is impossible for a layer.
        """
        found = self._by_name(layers)
        for name, selection in found.items():
            try:
                if isinstance(selection, Selection):  # or else any callable
                    selection.check(layers[name].n_experts)
            except ValueError as error:
                raise ValueError(f"plan, {layers[name].kind}, {name}: {error}") from None
        return found

    def _by_name(self, layers: Mapping[str, PlannedLayer]) -> dict[str, Selection]:
        found: dict[str, Selection] = {n: getattr(self, layer.kind) for n, layer in layers.items()}
        names: dict[str, str] = {}
        for name, selection in self.layers.items():
            full_name = _full_name(name, layers)
            if full_name in names:
                raise ValueError(f"plan: {names[full_name]!r} and {name!r} are both {full_name}")
            names[full_name] = name
            found[full_name] = selection
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "experts": _selection_to_dict(self.experts),
            "attention": _selection_to_dict(self.attention),
            "layers": {name: _selection_to_dict(each) for name, each in self.layers.items()},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read what `to_dict` wrote; only selections already defined are looked up.

        Raises:
            ValueError: for anything else.
        """
        by_blocks = isinstance(data, dict) and data.get("format_version") == _BLOCK_FORMAT_VERSION
        version = _BLOCK_FORMAT_VERSION if by_blocks else FORMAT_VERSION
        check_version("the plan", data, version)
        check_json("the plan", data, {"format_version": int, **_FIELDS[version]})
        if by_blocks:
            both = data["experts"], data["attention"]
            return cls.of_blocks(*(tuple(map(_selection_from_dict, each)) for each in both))
        if len(data["layers"]) > 2 * MAX_LAYERS:
            raise ValueError(f"the plan: {len(data['layers'])} layers, at most {2 * MAX_LAYERS}")
        check_json("the layers of the plan", list(data["layers"]), list[ShortText])
        layers = {name: _selection_from_dict(each) for name, each in data["layers"].items()}
        experts, attention = (_selection_from_dict(data[kind]) for kind in ("experts", "attention"))
        return cls(experts, attention, layers)

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

    def __getstate__(self) -> dict[str, Any]:
        """What pickles and copies hold."""
        return {**vars(self), "layers": dict(self.layers)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take that state; version 0.1 had one selection for each block."""
        if "layers" not in state:
            state = vars(type(self).of_blocks(state["experts"], state["attention"]))
        self.__dict__.update({**state, "layers": MappingProxyType(dict(state["layers"]))})


def check_plan(plan: object) -> None:
    """Raise a TypeError that names what was meant, unless it is a plan."""
    if not isinstance(plan, SelectionPlan):
        raise TypeError(
            "a plan holds a selection for each kind of layer, such as "
            f"SelectionPlan(experts=TopK(2)); got {plan!r:.80}"
        )


def describe(plan: SelectionPlan, layers: Mapping[str, PlannedLayer] | None = None) -> str:
    """A plan in words.

    Args:
        plan: the plan.
        layers: the routed layers of a model, to say where exceptions lie between.

    Examples:
        >>> from lightning_dsmoe.routing import SelectionPlan, Threshold, TopK
        >>> describe(SelectionPlan(experts=Threshold(0.5), attention=TopK(2)))
        'experts: threshold 0.5; attention: top 2'
        >>> describe(SelectionPlan(experts=TopK(2), layers={"blocks.0.feed_forward": TopK(1)}))
        'experts: top 2; attention: all; 1 exception'
    """
    if layers is not None:
        of_kind: dict[str, list[Selection]] = {"experts": [], "attention": []}
        for name, selection in plan._by_name(layers).items():
            of_kind[layers[name].kind].append(selection)
        parts = {kind: describe_selections(each) for kind, each in of_kind.items() if each}
        return "; ".join(f"{kind}: {words}" for kind, words in parts.items())
    experts, attention = (describe_selections([each]) for each in (plan.experts, plan.attention))
    words = f"experts: {experts}; attention: {attention}"
    if others := len(plan.layers):
        words += f"; {others} exception{'s' * (others > 1)}"
    return words


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


def _full_name(name: str, layers: Iterable[str]) -> str:
    """The one layer that a plan means by a name or the end of one."""
    names = list(layers)
    # A plan of a module that has this model as an attribute names more than the model does.
    found = (
        [each for each in names if each == name]
        or [each for each in names if each.endswith(f".{name}")]
        or [each for each in names if name.endswith(f".{each}")]
    )
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"plan: {name!r} is more than one layer: {', '.join(found)}")
    nearest = get_close_matches(name, names, cutoff=0.0)
    raise ValueError(
        f"plan: the model has no routed layer {name!r}; the nearest names are {', '.join(nearest)}"
        if nearest
        else f"plan: the model has no routed layer {name!r}, and no other"
    )


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
    options = dict(data) if isinstance(data, dict) else {}
    name = options.pop("selection", None)
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"{short_repr(data)} is not a selection; known are {', '.join(sorted(known))}; to use "
            "your own, import its module first, with --import MODULE on the command line"
        )
    check_json("the options of a selection", list(options), list[ShortText])
    try:
        return known[name](**options)
    except TypeError as error:
        reason = " ".join(str(error).split())  # which may name an option of two lines
        raise ValueError(f"{short_repr(data)} is not a selection: {reason}") from None
