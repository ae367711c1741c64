"""Numbers of experts as coloured cells, one row for each layer.

Colours are classes of the style sheet: s0 to s10 from nothing to the most, and for changes less1 to
less5, s0 for none, and more1 to more5.

Shapes: E experts.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_dsmoe.analysis.report.escaping import escaped

_LEVELS = 10
_CHANGES = 5
_FEW, _SOME = 8, 24


def level(value: float, most: float) -> str:
    """Colour of a number from 0 to `most`."""
    return f"s{round(_LEVELS * min(1.0, value / most)) if most > 0 else 0}"


def change(value: float, most: float) -> str:
    """Colour of a number from -`most` to `most`."""
    step = round(_CHANGES * min(1.0, abs(value) / most)) if most > 0 else 0
    return f"{'more' if value > 0 else 'less'}{step}" if step else "s0"


def heat_map(
    rows: Sequence[Tensor | None],
    colour: Callable[[float, int], str],
    number: Callable[[float], str],
    title: Callable[[float, int], str],
    *,
    label: str,
) -> str:
    """HTML of a heat map of layers and experts.

    Args:
        rows: for each layer the values `[E]` of its experts, or None.
        colour: class of a cell, from its value and the number of experts.
        number: what a cell says where there is room, from its value.
        title: what it says at length, from its value and the number of experts.
        label: what the map shows.
    """
    axes = {len(row) for row in rows if row is not None}
    lines = [_axis(*axes)] if len(axes) == 1 else []
    for layer, row in enumerate(rows):
        name = f"layer {layer}"
        if row is None:
            lines.append(
                f'<div class="row"><b>{name}</b><span class="quiet">no experts</span></div>'
            )
            continue
        values: list[float] = row.tolist()
        cells = "".join(
            f'<li class="{colour(value, len(values))}" '
            f'title="{name}, expert {expert}: {escaped(title(value, len(values)))}">'
            f"{escaped(number(value))}</li>"
            for expert, value in enumerate(values)
        )
        lines.append(
            f'<div class="row"><b>{name}</b><ol class="cells walk {_room(len(values))}" '
            f'style="--n:{len(values)}" aria-label="{escaped(label)}, {name}">{cells}</ol></div>'
        )
    return f'<div class="map">{"".join(lines)}</div>'


def scale(colours: Sequence[str], least: str, most: str) -> str:
    """HTML that says what the colours of a heat map mean."""
    steps = "".join(f'<i class="{colour}"></i>' for colour in colours)
    return f'<p class="scale" aria-hidden="true">{escaped(least)} {steps} {escaped(most)}</p>'


def level_scale(least: str, most: str) -> str:
    """HTML of the colours of `level`."""
    return scale([f"s{step}" for step in range(_LEVELS + 1)], least, most)


def change_scale(least: str, most: str) -> str:
    """HTML of the colours of `change`."""
    steps = range(1, _CHANGES + 1)
    colours = [*(f"less{s}" for s in reversed(steps)), "s0", *(f"more{s}" for s in steps)]
    return scale(colours, least, most)


def _axis(n_experts: int) -> str:
    if n_experts > _SOME:
        return ""
    numbers = "".join(f"<span>{expert}</span>" for expert in range(n_experts))
    return (
        f'<div class="row axis {_room(n_experts)}" aria-hidden="true"><b></b>'
        f'<div class="cells {_room(n_experts)}" style="--n:{n_experts}">{numbers}</div></div>'
    )


def _room(n_experts: int) -> str:
    """Whether numbers fit into the cells: always, on a wide screen, or never."""
    return "few" if n_experts <= _FEW else "some" if n_experts <= _SOME else "many"
