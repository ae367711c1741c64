"""The command that writes a page on how a trained model uses its experts."""

import platform
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from lightning_dsmoe.analysis import HeldOut
from lightning_dsmoe.analysis.report import Report, report_page
from lightning_dsmoe.analysis.report.drift import drift
from lightning_dsmoe.analysis.report.lift import frequent_tokens
from lightning_dsmoe.analysis.report.sample_routing import sample_routing
from lightning_dsmoe.analysis.report.utilization import check_mixtures, utilization
from lightning_dsmoe.commands import evaluation_setup
from lightning_dsmoe.data.windows import IGNORED
from lightning_dsmoe.files import check_file, sha256, write_text
from lightning_dsmoe.inference import SparseModel, load_decoder
from lightning_dsmoe.routing import SelectionPlan, Threshold, routed_layers
from lightning_dsmoe.routing.plan import describe
from lightning_dsmoe.serialization.architecture import differences
from lightning_dsmoe.tokenizers import Tokenizer
from lightning_dsmoe.version import VERSION

_EPS = 0.1
_SAMPLE_TOKENS = 600


def report(
    ckpt_path: str,
    other: str | None = None,
    plan: str | None = None,
    output: str = "report.html",
    sample: str | None = None,
    **options: Any,
) -> None:
    """Write an HTML page on how a trained model uses its experts.

    It shows gate shares, effective and dead experts, the entropies of the routers, co-activation of
    experts, the most over-represented tokens of each expert, and a sample text colored by the
    number of experts that run for each token.

    Args:
        ckpt_path: checkpoint of `fit`.
        other: another checkpoint of the same training run; the page then shows the difference.
        plan: JSON file of a selection plan; by default experts with E·S above 0.1 run.
        output: path of the page.
        sample: text to color; by default the first tokens of the evaluated text.
        options: of the text and the device, see `open_trained`.

    Raises:
        ValueError: if a checkpoint, the plan, the sample or the text is invalid, or the other
            checkpoint belongs to another model.
    """
    check_file(output, ckpt_path, other, plan)
    model, counts, text, tokenizer = evaluation_setup.open_trained(ckpt_path, **options)
    check_mixtures(counts)
    selections = _plan(plan, model)
    before = None if other is None else _other(other, model, tokenizer).to(text.device)
    words = describe(selections, routed_layers(model.decoder))
    facts = _facts(
        {"Checkpoint": ckpt_path, "Other checkpoint": other},
        f"{words} ({'default' if plan is None else f'from {plan}'})",
        text,
        options,
    )
    sample_experts = sample_routing(
        model,
        selections,
        _tokens(sample, tokenizer, text),
        context=text.batches[0][0].shape[1],
        most=_SAMPLE_TOKENS,
    )
    frequent = frequent_tokens(text)
    models = [model] if before is None else [model, before]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(f"{text.n_tokens:,} tokens", total=len(models) * len(text.batches))
        use, *others = [
            utilization(each, selections, text, counts, frequent, lambda: progress.advance(task))
            for each in models
        ]
    page = report_page(
        Report(
            title=Path(ckpt_path).name,
            facts=facts,
            counts=counts,
            n_layers=model.decoder.n_layers,
            use=use,
            frequent=frequent,
            token_text=cache(tokenizer.piece),
            sample=sample_experts,
            drift=drift(use, others[0]) if others else None,
        )
    )
    write_text(Path(output), page)
    print(f"The report is in {output}")


def _plan(path: str | None, model: SparseModel) -> SelectionPlan:
    if path is not None:
        return evaluation_setup.read_plan(path, model.decoder)
    return SelectionPlan(experts=Threshold(_EPS), attention=Threshold(_EPS))


def _other(path: str, model: SparseModel, tokenizer: Tokenizer) -> SparseModel:
    """Load the other checkpoint and check that it belongs to the same model."""
    loaded = load_decoder(path)
    if evaluation_setup.tokenizer_of(loaded).fingerprint() != tokenizer.fingerprint():
        raise ValueError(f"{path} has another tokenizer, so the two cannot be compared")
    other = evaluation_setup.all_experts_model(loaded.decoder)
    if changes := differences(model.architecture, other.architecture):
        raise ValueError(f"{path} is of another architecture: {'; '.join(changes)}")
    return other


def _tokens(sample: str | None, tokenizer: Tokenizer, text: HeldOut) -> Tensor:
    """Tokens of the sample; what is not UTF-8 is replaced."""
    if sample is None:
        inputs_BT, labels_BT = text.batches[0]
        return inputs_BT[labels_BT != IGNORED][:_SAMPLE_TOKENS]
    clean = sample.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return torch.as_tensor(tokenizer.encode(clean)).long().to(text.device)


def _facts(
    checkpoints: Mapping[str, str | None], plan: str, text: HeldOut, options: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Names and values of the head of the page: what was measured, and on which text."""
    python = f"Python {platform.python_version()}"
    files = options.get("files") or f"the standard library of {python}"
    names = files if isinstance(files, str) else ", ".join(files)
    text_name = f"{options.get('split', 'val')} split of {names}"
    return [
        *(
            (name, f"{path}, SHA-256 {_short(sha256(Path(path)))}")
            for name, path in checkpoints.items()
            if path is not None
        ),
        ("Plan", plan),
        ("Text", f"{text.n_tokens:,} tokens, {text_name}, SHA-256 {_short(text.fingerprint())}"),
        ("Date", datetime.now().astimezone().isoformat(" ", "minutes")),
        ("Versions", f"lightning_dsmoe {VERSION}, torch {torch.__version__}, {python}"),
    ]


def _short(digest: str) -> str:
    return f"{digest[:16]}…"
