"""The parts of the page about tokens, as HTML."""

from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_dsmoe.analysis.report.escaping import escaped, visible
from lightning_dsmoe.analysis.report.heat_map import level, level_scale
from lightning_dsmoe.analysis.report.lift import (
    FrequentTokens,
    TokenLift,
    over_represented,
)
from lightning_dsmoe.analysis.report.naming import count_experts, kinds
from lightning_dsmoe.analysis.report.sample_routing import SampleRouting
from lightning_dsmoe.analysis.report.utilization import ModelUse, routers

TokenText = Callable[[int], str]
"""The text of a token by its number."""

_MOST_TOKENS, _LEAST_TOKENS = 8, 3
_ALL_TOKENS = 24_000
_NAMED_EXPERTS = 6
_MOST_QUANTILE = 0.98  # few tokens that need many more shall not make all others look alike


def favourites(use: ModelUse, frequent: FrequentTokens, text: TokenText) -> str:
    """The tokens that each expert likes, layer by layer; fewer of each where experts are many."""
    if not len(frequent.numbers_U):
        return '<p class="quiet">The text is too short: no token occurs often enough.</p>'
    most = max(_LEAST_TOKENS, min(_MOST_TOKENS, _ALL_TOKENS // count_experts(use)))
    parts = []
    for name, layers in kinds(use):
        for layer, router in routers(layers):
            likes = over_represented(router.token_gates_UE, router.gates.share, frequent, most)
            dead = set(router.dead_experts)
            cards = "".join(
                _card(expert, share, expert in dead, liked, text)
                for expert, (share, liked) in enumerate(
                    zip(router.gates.share.tolist(), likes, strict=True)
                )
            )
            parts.append(
                f"<details{'' if layer else ' open'}><summary>Layer {layer}, {name}</summary>"
                f'<ul class="cards">{cards}</ul></details>'
            )
    return "".join(parts)


def _card(expert: int, share: float, is_dead: bool, liked: list[TokenLift], text: TokenText) -> str:
    chips = "".join(
        f'<span class="chip" title="lift {like.lift:.2f}, read {like.seen} times">'
        f"<bdi>{escaped(visible(text(like.token), like.token))}</bdi>"
        f"<small>{like.lift:.1f}</small></span>"
        for like in liked
    )
    dead = ' class="dead"' if is_dead else ""
    chips = chips or '<span class="quiet">nothing above its mean</span>'
    return (
        f'<li{dead}><b>{expert}</b><small>{share:.1%}</small><span class="walk">{chips}</span></li>'
    )


def sample(routing: SampleRouting, text: TokenText) -> str:
    """A text coloured by the number of experts that each token runs, of all layers together."""
    running_T = routing.n_running_T
    least = int(running_T.min())
    most = int(running_T.double().quantile(_MOST_QUANTILE).ceil())
    words = _coloured(routing, running_T, least, most, text)
    return words + level_scale(f"{least} experts", f"{most} or more")


def _coloured(
    routing: SampleRouting, running_T: Tensor, least: int, most: int, text: TokenText
) -> str:
    layers = [*_layers("feed-forward", routing.experts), *_layers("attention", routing.attention)]
    total = sum(running_TE.shape[-1] for _, running_TE in layers)
    names = [_names(name, running_TE) for name, running_TE in layers]
    spans = []
    for place, (token, running) in enumerate(zip(routing.tokens, running_T.tolist(), strict=True)):
        token_text = text(token)
        shown = escaped(visible(token_text, token))
        title = f"{running} of {total} experts; {'; '.join(name[place] for name in names)}"
        colour = level(running - least, most - least)
        spans.append(f'<span class="{colour}" title="{shown}: {title}">{shown}</span>')
        if "\n" in token_text:
            spans.append("<br>")
    rest = f'<p class="quiet">and {routing.left_out:,} more tokens</p>' if routing.left_out else ""
    return f'<p class="sample walk">{"".join(spans)}</p>{rest}'


def _layers(name: str, masks: Sequence[Tensor | None]) -> list[tuple[str, Tensor]]:
    return [(f"{name} {layer}", mask) for layer, mask in enumerate(masks) if mask is not None]


def _names(name: str, running_TE: Tensor) -> list[str]:
    """For every token the experts of a layer that run, their number alone if they are many."""
    rows = []
    for running_E in running_TE:
        experts: list[int] = running_E.nonzero().flatten().tolist()
        many = len(experts) > _NAMED_EXPERTS
        shown = f"{len(experts)} of {len(running_E)}" if many else ", ".join(map(str, experts))
        rows.append(f"{name}: {shown}")
    return rows
