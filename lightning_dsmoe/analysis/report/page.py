"""The report as one HTML page, rendered from the templates beside this file."""

import base64
import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lightning_dsmoe.analysis.report.drift import Drift
from lightning_dsmoe.analysis.report.lift import LEAST_COUNT, FrequentTokens
from lightning_dsmoe.analysis.report.sample_routing import SampleRouting
from lightning_dsmoe.analysis.report.utilization import ModelUse
from lightning_dsmoe.analysis.report.view import kinds_of, printable, sample_tokens, visible
from lightning_dsmoe.metrics import DEAD_SHARE, ParameterCounts
from lightning_dsmoe.units import digits, percent

_PACKAGE = "lightning_dsmoe.analysis.report"
_LEVELS, _CHANGES = 10, 5
_LARGEST_SQUARE = 32
_MOST_QUANTILE = 0.98  # otherwise a few outliers would take most of the color scale


class Report(NamedTuple):
    """Everything that the page shows.

    Args:
        title: name of the model.
        facts: names and values of the head of the page, such as the checkpoint and the text.
        counts: parameter counts of the decoder.
        n_layers: number of its blocks.
        use: how the model uses its experts.
        frequent: the tokens whose lift is shown.
        token_text: text of a token.
        sample: the text that is colored by the number of experts that run.
        drift: the difference from another checkpoint; None without one.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    counts: ParameterCounts
    n_layers: int
    use: ModelUse
    frequent: FrequentTokens
    token_text: Callable[[int], str]
    sample: SampleRouting
    drift: Drift | None


def report_page(report: Report) -> str:
    """HTML of a report, which loads nothing and runs only its own script.

    Args:
        report: what was measured.

    Returns:
        The page. Titles, facts and tokens come from strangers' files: they are escaped, and
        characters that cannot be printed appear as their codes.

    Examples:
        >>> from functools import partial
        >>> import torch
        >>> from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts
        >>> from lightning_dsmoe.analysis import HeldOut
        >>> from lightning_dsmoe.analysis.report import Report, report_page
        >>> from lightning_dsmoe.analysis.report.lift import frequent_tokens
        >>> from lightning_dsmoe.analysis.report.sample_routing import sample_routing
        >>> from lightning_dsmoe.analysis.report.utilization import utilization
        >>> from lightning_dsmoe.inference import compile_sparse
        >>> from lightning_dsmoe.metrics import count_parameters
        >>> from lightning_dsmoe.routing import SelectionPlan, TopK
        >>> decoder = Decoder(
        ...     vocab_size=50,
        ...     d_model=16,
        ...     n_layers=2,
        ...     attention=partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=8),
        ...     feed_forward=partial(MixtureOfExperts, n_experts=4, d_expert=8),
        ... )
        >>> plan = SelectionPlan(experts=TopK(2), attention=TopK(1))
        >>> model, counts = compile_sparse(decoder.eval(), plan), count_parameters(decoder)
        >>> inputs, labels = torch.randint(50, (2, 4, 8))
        >>> text = HeldOut([(inputs, labels)], n_tokens=32)
        >>> frequent = frequent_tokens(text, least=1)
        >>> page = report_page(
        ...     Report(
        ...         title="a small model",
        ...         facts=[("Text", "32 random tokens")],
        ...         counts=counts,
        ...         n_layers=decoder.n_layers,
        ...         use=utilization(model, plan, text, counts, frequent),
        ...         frequent=frequent,
        ...         token_text="token {}".format,
        ...         sample=sample_routing(model, plan, inputs[0], context=8, most=100),
        ...         drift=None,
        ...     )
        ... )
        >>> "<title>How a small model uses its experts</title>" in page
        True
    """
    use, drift, counts, sample = report.use, report.drift, report.counts, report.sample
    kinds = kinds_of(use, drift, report.frequent, report.n_layers)
    script = _packaged("page.js")
    template = _templates().get_template("page.html.jinja")
    return template.render(
        style=_packaged("page.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=report.title,
        facts=report.facts,
        n_parameters=counts.outside + counts.hidden,
        n_hidden=counts.hidden,
        n_layers=report.n_layers,
        active=[share.item() for share in use.active],
        losses=(use.loss, use.plan_loss),
        other_losses=None if drift is None else (drift.loss, drift.plan_loss),
        kinds=kinds,
        layers=[layer for kind in kinds for layer in kind.routed],
        largest_square=_LARGEST_SQUARE,
        dead_share=DEAD_SHARE,
        least_count=LEAST_COUNT,
        n_frequent=len(report.frequent.numbers_U),
        shown=lambda token: visible(report.token_text(token), token),
        sample=list(sample_tokens(sample, report.token_text, report.n_layers)),
        left_out=sample.left_out,
        most_running=int(sample.n_running_T.double().quantile(_MOST_QUANTILE).ceil()),
    )


def level(value: float, most: float) -> str:
    """Style sheet class of the color of a number from 0 to `most`: s0 to s10."""
    return f"s{round(_LEVELS * min(1.0, value / most)) if most > 0 else 0}"


def change(value: float, most: float) -> str:
    """The same for a number from -`most` to `most`: less5 to less1, s0, more1 to more5."""
    step = round(_CHANGES * min(1.0, abs(value) / most)) if most > 0 else 0
    return f"{'more' if value > 0 else 'less'}{step}" if step else "s0"


def size(number: float) -> str:
    """A number of parameters, such as "1.50 M"."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{digits(number / unit)}{name}"
    return str(number)


@cache
def _templates() -> Environment:
    """Templates that escape every value, and show what cannot be printed as its code."""
    templates = Environment(
        loader=PackageLoader(_PACKAGE),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters.update(level=level, change=change, digits=digits, percent=percent, size=size)
    return templates


def _packaged(name: str) -> Markup:
    return Markup(files(_PACKAGE).joinpath(name).read_text("utf-8"))
