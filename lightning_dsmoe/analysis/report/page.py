"""The whole page: what was measured, put between a style sheet and a small script."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

from lightning_dsmoe.analysis.report.drift import Drift
from lightning_dsmoe.analysis.report.escaping import escaped
from lightning_dsmoe.analysis.report.gates import drift_maps, gate_maps
from lightning_dsmoe.analysis.report.layers import layer_tables
from lightning_dsmoe.analysis.report.lift import LEAST_COUNT, FrequentTokens
from lightning_dsmoe.analysis.report.naming import count_experts, kinds, mean_effective
from lightning_dsmoe.analysis.report.pairs import together
from lightning_dsmoe.analysis.report.sample_routing import SampleRouting
from lightning_dsmoe.analysis.report.tokens import TokenText, favourites, sample
from lightning_dsmoe.analysis.report.utilization import ModelUse, RouterUse
from lightning_dsmoe.metrics import ParameterCounts
from lightning_dsmoe.routing import SelectionPlan


class Report(NamedTuple):
    """What the page is made of.

    Args:
        title: name of the model.
        facts: what was measured on what, as names and values.
        counts: parameters of the decoder.
        plan: the experts that run.
        use: how the model uses its experts.
        frequent: the tokens that preferences are told of.
        token_text: text of a token.
        sample: the text to colour.
        drift: what differs from another checkpoint; None without one.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    counts: ParameterCounts
    plan: SelectionPlan
    use: ModelUse
    frequent: FrequentTokens
    token_text: TokenText
    sample: SampleRouting
    drift: Drift | None


class _Section(NamedTuple):
    anchor: str
    heading: str
    explanation: str
    content: str


def report_page(report: Report) -> str:
    """HTML of a report, which loads nothing and runs only its own script."""
    style, script = _packaged("page.css"), _packaged("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    title = f"How {escaped(report.title)} uses its experts"
    sections = _sections(report)
    links = "".join(f'<a href="#{s.anchor}">{s.heading}</a>' for s in sections)
    body = "".join(
        f'<section id="{s.anchor}"><h2>{s.heading}</h2>'
        f'<p class="explanation">{s.explanation}</p>{s.content}</section>'
        for s in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style}</style></head>\n<body>"
        '<label class="theme"><input type="checkbox" id="theme" role="switch">'
        "<span>Light / dark</span></label>"
        f"<header><p>DS-MoE utilization report</p><h1>{title}</h1>"
        f"{_tiles(report)}{_facts(report.facts)}</header>"
        f'<nav aria-label="Sections">{links}</nav><main>{body}</main>'
        f"<script>{script}</script></body></html>\n"
    )


def _sections(report: Report) -> list[_Section]:
    use, drift = report.use, report.drift
    sections = [
        _Section(
            "gates",
            "Share of the gates",
            "The mean gate of every expert in percent, with all experts running. Balanced experts "
            "have the same colour. Layers and experts are numbered from 0, as in plans and logs.",
            gate_maps(use),
        ),
        _Section(
            "layers",
            "Layer by layer",
            "Effective experts, exp H(e), are as many as would give this entropy if used evenly. "
            "H(e) is high if the experts are in balance, H(e|x) is low if every token is sure of "
            "its experts; both in nats. Running is the mean number of experts under the plan.",
            layer_tables(use, report.plan),
        ),
        _Section(
            "together",
            "Experts that run together",
            "Share of the tokens for which two experts both run under the plan; rows and columns "
            "are experts. Below are the strongest pairs; their lift is how many times as often "
            "they meet as if each ran regardless of the other.",
            together(use),
        ),
        _Section(
            "tokens",
            "What each expert likes",
            "The tokens of the highest lift: the mean gate of the expert on that token as a "
            "multiple of its mean gate on all tokens, with all experts running. Only tokens that "
            f"were read at least {LEAST_COUNT} times count. A percentage is the expert's share of "
            "the gates; the border of a dead expert is dashed.",
            favourites(use, report.frequent, report.token_text),
        ),
        _Section(
            "sample",
            "Where experts are needed",
            "The number of experts that each token runs under the plan, of all layers and of both "
            "kinds; each token's title names them.",
            sample(report.sample, report.token_text),
        ),
    ]
    if drift is not None:
        losses = (
            f"<p>Loss with all experts {use.loss:.4f} here and {drift.loss:.4f} there; under the "
            f"plan {use.plan_loss:.4f} here and {drift.plan_loss:.4f} there.</p>"
        )
        sections.append(
            _Section(
                "drift",
                "Change from the other checkpoint",
                "Each expert's share of the gates here less that in the other checkpoint. Experts "
                "keep their numbers only within one training.",
                losses + drift_maps(drift),
            )
        )
    return sections


def _tiles(report: Report) -> str:
    use, counts = report.use, report.counts
    active = use.active
    tiles = [
        ("Parameters", _size(counts.outside + counts.hidden), f"{_size(counts.hidden)} hidden"),
        ("Layers", f"{len(counts.experts)}", f"{count_experts(use)} experts"),
        (
            "Active share",
            f"{active.mean.item():.1%}",
            f"p50 {active.p50.item():.1%}, p95 {active.p95.item():.1%}",
        ),
        ("Loss, all experts", f"{use.loss:.4f}", "nats per token"),
        (
            "Loss, plan",
            f"{use.plan_loss:.4f}",
            f"{use.plan_loss / use.loss - 1:+z.2%}" if use.loss else "",
        ),
        *(_effective(kind, layers) for kind, layers in kinds(use)),
    ]
    return '<dl class="tiles">{}</dl>'.format(
        "".join(
            f"<div><dt>{name}</dt><dd>{value}</dd><dd><small>{note}</small></dd></div>"
            for name, value, note in tiles
        )
    )


def _effective(kind: str, layers: Sequence[RouterUse | None]) -> tuple[str, str, str]:
    effective, n_experts = mean_effective(layers)
    kind = kind.removesuffix(" experts")
    return "Effective experts", f"{effective:.1f}", f"of {n_experts:g} {kind}"


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    rows = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in facts
    )
    return f'<dl class="facts">{rows}</dl>'


def _size(n_parameters: int) -> str:
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if n_parameters >= unit:
            return f"{n_parameters / unit:.1f}{name}"
    return str(n_parameters)


def _packaged(name: str) -> str:
    return files("lightning_dsmoe.analysis.report").joinpath(name).read_text("utf-8")
