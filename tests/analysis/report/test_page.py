"""The page: nothing in it runs or loads what a text says, and it stays a page of HTML."""

import base64
import hashlib
import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
import torch
from markupsafe import escape

from lightning_dsmoe.analysis.report import Report, report_page
from lightning_dsmoe.analysis.report.drift import drift
from lightning_dsmoe.analysis.report.lift import FrequentTokens
from lightning_dsmoe.analysis.report.page import change, level, size
from lightning_dsmoe.analysis.report.sample_routing import SampleRouting
from lightning_dsmoe.analysis.report.utilization import ModelUse, RouterUse
from lightning_dsmoe.analysis.report.view import printable, visible
from lightning_dsmoe.metrics import (
    ActiveShare,
    ParameterCounts,
    RoutedParameters,
    expert_utilization,
)
from lightning_dsmoe.routing import AllExperts, Selection, Threshold, TopK
from lightning_dsmoe.routing.routing import Kind, block_layer_name
from lightning_dsmoe.units import percent

VOID = {"meta", "br", "input"}
HOSTILE = (
    "<script>alert(1)</script>",
    "\"' onmouseover='alert(2)' x=\"",
    "</style><img src=x onerror=alert(3)>",
    "</title><h9>",
    "&lt;h9&gt;&#60;h9&#62;",
    "<!--",
    "]]>",
    "\u2028\u2029\u202e\u200b\x00\x1b[31m",
    "\udcff\ud800",
    "\N{REPLACEMENT CHARACTER}",
    "javascript:alert(4)",
)


class Page(HTMLParser):
    """What a browser makes of a page; fails on tags that do not close."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open[-1:] == ["script"] else self.texts).append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def router(n_experts: int, n_frequent: int) -> RouterUse:
    probs = (3 * torch.randn(200, n_experts)).softmax(-1)
    running = probs * n_experts > 0.5
    together = running.double().T @ running.double() / 200
    gates = torch.rand(n_frequent, n_experts)
    used = expert_utilization(probs)
    return RouterUse(used, together, gates, probs.argmax(-1))


def make_report(
    experts: list[int | None],
    attention: list[int | None],
    *,
    text: Callable[[int], str] = str,
    title: str = "model",
    facts: tuple[tuple[str, str], ...] = (),
    selections: dict[str, Selection] | None = None,
    n_frequent: int = 11,
    with_drift: bool = True,
) -> Report:
    torch.manual_seed(5)
    sizes: dict[str, int] = {}
    kinds: tuple[tuple[Kind, list[int | None]], ...] = (
        ("experts", experts),
        ("attention", attention),
    )
    for kind, numbers in kinds:
        sizes |= {block_layer_name(b, kind): n for b, n in enumerate(numbers) if n is not None}
    selections = dict.fromkeys(sizes, Threshold(0.5)) | (selections or {})
    uses = [
        ModelUse(
            {name: router(n, n_frequent) for name, n in sizes.items()},
            selections,
            1.5,
            1.6,
            ActiveShare(*torch.tensor([0.3, 0.25, 0.4])),
        )
        for _ in range(2)
    ]
    masks = {name: torch.rand(n_frequent, n) < 0.5 for name, n in sizes.items()}
    tokens = list(range(n_frequent))
    return Report(
        title=title,
        facts=facts,
        counts=ParameterCounts(
            100, 50, {name: RoutedParameters(n, 10) for name, n in sizes.items()}
        ),
        n_layers=len(experts),
        use=uses[0],
        frequent=FrequentTokens(torch.tensor(tokens), torch.full((n_frequent,), 30)),
        token_text=text,
        sample=SampleRouting(tokens, masks, 7),
        drift=drift(*uses) if with_drift else None,
    )


def test_every_part_is_there() -> None:
    page = report_page(make_report([5, 5], [3, 3]))
    for words in (
        "Gate share",
        "Layer by layer",
        "Co-activation",
        "Most over-represented tokens",
        "Experts per token",
        "Difference from the other checkpoint",
        "7 more tokens are not shown",
        ">1.500<",
        ">1.600<",
        "6.67 % above all experts",
        ">30 %<",
        "median 25 %, 95th percentile 40 %",
    ):
        assert words in page
    links = re.findall(r'href="#(\w+)"', page)
    assert len(links) == 6
    assert all(f'id="{link}"' in page for link in links)
    assert "Difference from" not in report_page(make_report([5], [3], with_drift=False))


def test_numbers_of_the_heat_map() -> None:
    report = make_report([5], [None])
    use = report.use.layers["blocks.0.feed_forward"]
    titles = [v for _, name, v in Page(report_page(report)).attributes if name == "title"]
    for expert, share in enumerate(use.gates.share.tolist()):
        expected = f"layer 0, expert {expert}: {percent(share)} of the gates"
        assert sum(str(title).startswith(expected) for title in titles) == 1
    for first in range(5):
        for second in range(first):
            share = use.together_EE[first, second].item()
            words = f"layer 0, experts {second} and {first} run together for {percent(share)} of"
            assert sum(str(title).startswith(words) for title in titles) == (share > 0)


def test_dead_experts_are_named() -> None:
    report = make_report([6, 6], [3, None])
    use = report.use.layers["blocks.1.feed_forward"]
    use.together_EE[:, 4] = use.together_EE[4, :] = 0
    page = " ".join("".join(Page(report_page(report)).texts).split())
    dead = ", ".join(
        f"{e} ({percent(use.gates.share[e].item())}{'' if use.running_E[e] else ', never runs'})"
        for e in use.dead_experts
    )
    assert 4 in use.dead_experts
    assert f"layer 1, feed-forward expert {dead}" in page
    n_dead = sum(len(router.dead_experts) for router in report.use.layers.values())
    assert f"{n_dead} dead expert" in page


@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_text_from_outside_stays_text(hostile: str) -> None:
    plain = Page(report_page(make_report([4], [2], text=lambda token: "a", facts=(("a", "b"),))))
    page = report_page(
        make_report(
            [4], [2], text=lambda token: hostile, title=hostile, facts=((hostile, hostile),)
        )
    )
    page.encode("utf-8")
    found = Page(page)
    assert found.scripts == plain.scripts
    assert found.tags == plain.tags
    assert {(t, n) for t, n, _ in found.attributes} == {(t, n) for t, n, _ in plain.attributes}
    assert not [n for _, n, _ in found.attributes if n.startswith("on")]
    printed = "".join(found.texts)
    assert not [c for c in printed if c != "\n" and not c.isprintable()]
    assert escape(printable(hostile)) in page


def test_quotes_and_tags_stay_inside_an_attribute() -> None:
    hostile = """"'><script>alert("x")</script>"""
    found = Page(report_page(make_report([4], [2], text=lambda token: hostile)))
    titles = [value or "" for _, name, value in found.attributes if name == "title"]
    assert sum(title.startswith(f"{hostile}: ") for title in titles) == 11
    assert len(found.scripts) == 1


def test_nothing_is_loaded() -> None:
    page = report_page(make_report([4, 40], [2, 2]))
    found = Page(page)
    for tag, name, value in found.attributes:
        assert name not in {"src", "srcset", "action", "data", "poster"}, tag
        assert name != "href" or (value or "").startswith("#")
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(found.tags)
    for address in ("http:", "https:", "//cdn", "url(", "@import", "fetch(", "XMLHttp", "import("):
        assert address not in page
    [script] = found.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = [v for t, n, v in found.attributes if (t, n) == ("meta", "content") and "src" in v]
    assert policy == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


@pytest.mark.parametrize(
    ("experts", "attention"),
    [([4, None], [None, 3]), ([None, None], [3, 3]), ([5], [None]), ([1], [1]), ([33, 2], [2, 9])],
)
def test_layers_without_experts(experts: list[int | None], attention: list[int | None]) -> None:
    page = report_page(make_report(experts, attention))
    Page(page)
    assert page.count("no experts") == 2 * sum(
        kind.count(None) for kind in (experts, attention) if set(kind) != {None}
    )


def test_many_experts_fit_in_a_page() -> None:
    page = report_page(make_report([256] * 2, [256] * 2, n_frequent=60))
    assert len(page.encode()) < 5_000_000 / 3
    assert len(Page(page).tags) > 2 * 2 * 256


def test_a_text_without_frequent_tokens() -> None:
    report = make_report([4], [None])
    [(name, use)] = report.use.layers.items()
    unseen = report.use._replace(layers={name: use._replace(token_gates_UE=torch.zeros(0, 4))})
    nothing = torch.zeros(0, dtype=torch.int64)
    page = report_page(report._replace(use=unseen, frequent=FrequentTokens(nothing, nothing)))
    assert "No token occurs often enough" in page


def test_plans_that_differ_from_layer_to_layer() -> None:
    selections: dict[str, Selection] = {
        "blocks.0.feed_forward": TopK(2),
        "blocks.1.feed_forward": Threshold(0.25),
        "blocks.0.attention": AllExperts(),
        "blocks.1.attention": AllExperts(),
    }
    page = report_page(make_report([4, 4], [2, 2], selections=selections))
    assert "<td>top 2</td>" in page
    assert "<td>threshold 0.25</td>" in page
    assert "<td>all</td>" not in page


def test_many_experts_of_a_token_are_counted_not_named() -> None:
    report = make_report([20], [2])
    mask = torch.zeros(11, 20, dtype=torch.bool)
    mask[0, :7], mask[1, 3:5] = True, True
    layers = {**report.sample.layers, "blocks.0.feed_forward": mask}
    sample = report.sample._replace(layers=layers)
    page = report_page(report._replace(sample=sample))
    assert "feed-forward 0: 7 of 20" in page
    assert "feed-forward 0: 3, 4;" in page


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "␣the"),
        ("\n\n", "⏎⏎"),
        ("\t", "⇥"),
        ("\r", "\\r"),
        ("", "#7"),
        ("\N{REPLACEMENT CHARACTER}", "#7"),
        ("\u2028", "\\u2028"),
        ("\u202e", "\\u202e"),
        ("\u0301", "\N{DOTTED CIRCLE}\u0301"),
        ("é€", "é€"),
        ("<", "<"),
    ],
)
def test_tokens_are_visible(token: str, shown: str) -> None:
    assert visible(token, 7) == shown


def test_what_cannot_be_printed() -> None:
    assert printable("a\nb\u2028\udcff <é>") == "a\\nb\\u2028\\udcff <é>"


def test_colours() -> None:
    assert [level(v, 2) for v in (0, 0.09, 1, 2, 5)] == ["s0", "s0", "s5", "s10", "s10"]
    assert [change(v, 2) for v in (-3, -2, -0.1, 0, 1, 2)] == [
        "less5",
        "less5",
        "s0",
        "s0",
        "more2",
        "more5",
    ]
    assert level(1, 0) == change(1, 0) == "s0"


def test_sizes_have_three_significant_digits() -> None:
    assert [size(n) for n in (999, 1500, 2.34e6, 1e9)] == ["999", "1.5 k", "2.34 M", "1 G"]
