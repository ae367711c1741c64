"""Tables of what the routers of all layers do, and the dead experts."""

from collections.abc import Sequence
from itertools import groupby

from lightning_dsmoe.analysis.report.escaping import escaped
from lightning_dsmoe.analysis.report.naming import KINDS, kinds, selection_label
from lightning_dsmoe.analysis.report.utilization import ModelUse, RouterUse, routers
from lightning_dsmoe.metrics import DEAD_SHARE
from lightning_dsmoe.routing import Selection, SelectionPlan


def layer_tables(use: ModelUse, plan: SelectionPlan) -> str:
    """Effective experts, entropies, experts that run, and dead experts of every layer."""
    selections = dict(zip(KINDS, (plan.experts, plan.attention), strict=True))
    tables = "".join(
        f"<h3>{name.capitalize()}</h3>{_layer_table(layers, selections[name])}"
        for name, layers in kinds(use)
    )
    return tables + _dead(use)


def _layer_table(layers: Sequence[RouterUse | None], selections: Sequence[Selection]) -> str:
    heads = [
        ("Layer", "number of the layer"),
        ("Effective", "experts of an even use with the same entropy, exp H(e)"),
        ("H(e)", "entropy of the gate shares, in nats"),
        ("H(e|x)", "mean entropy of a token's gates, in nats"),
        ("Running", "mean number of experts that run for a token under the plan"),
        ("Dead", "experts that are hardly used"),
    ]
    several = len(set(selections)) > 1
    if several:
        heads.append(("Plan", "which experts run"))
    head = "".join(f'<th scope="col" title="{title}">{name}</th>' for name, title in heads)
    rows = "".join(
        _layer_row(layer, use, selections[layer] if several else None)
        for layer, use in routers(layers)
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _layer_row(layer: int, use: RouterUse, selection: Selection | None) -> str:
    gates, n_experts = use.gates, len(use.running_E)
    effective = gates.effective.item()
    cells = [
        f"{gates.entropy.item():.2f}",
        f"{gates.conditional_entropy.item():.2f}",
        f"{use.running_E.sum().item():.2f}",
        f"{len(use.dead_experts) or '–'}",
    ]
    if selection is not None:
        cells.append(escaped(selection_label(selection)))
    return (
        f'<tr><th scope="row">{layer}</th>'
        f'<td class="bar"><span>{effective:.1f} <small>of {n_experts}</small></span>'
        f'<i style="--part:{effective / n_experts:.3f}"></i></td>'
        f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    )


def _dead(use: ModelUse) -> str:
    dead = [
        (f"layer {layer}, {name.removesuffix('s')}", expert, router)
        for name, layers in kinds(use)
        for layer, router in routers(layers)
        for expert in router.dead_experts
    ]
    lines = [
        f"<li>{layer} {', '.join(_dead_expert(e, router) for _, e, router in group)}</li>"
        for layer, group in groupby(dead, key=lambda found: found[0])
    ]
    criterion = (
        f"An expert counts as dead if its share of the gates is at most {DEAD_SHARE:.0%} of an "
        "even share, or if it never runs under the plan."
    )
    if not dead:
        return f"<p><strong>No expert is dead.</strong> {criterion}</p>"
    number = f"{len(dead)} dead expert{'' if len(dead) == 1 else 's'}"
    return (
        f"<details open><summary>{number}</summary><p>{criterion} In brackets is its share.</p>"
        f'<ul class="names">{"".join(lines)}</ul></details>'
    )


def _dead_expert(expert: int, use: RouterUse) -> str:
    never = "" if use.running_E[expert] else ", never runs"
    return f"{expert} <small>({use.gates.share[expert].item():.2%}{never})</small>"
