"""Sparse models without the experts that a text never uses."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_dsmoe.analysis import evaluate_plan
from lightning_dsmoe.analysis.unused_experts import Proof, prove, used_experts
from lightning_dsmoe.commands.evaluation_setup import read_plan, text_for
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference import Remaining, SparseModel, compile_sparse, load_decoder
from lightning_dsmoe.inference import prune as without_others
from lightning_dsmoe.inference.artifact.directory import check_free
from lightning_dsmoe.inference.engine.weights.packing import Quantization
from lightning_dsmoe.metrics import count_parameters
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.serialization.checkpoint import LoadedDecoder
from lightning_dsmoe.serialization.pruning import remaining_experts


def prune(
    ckpt_path: str,
    plan: str,
    output: str = "pruned",
    quantization: Quantization | None = None,
    **options: Any,
) -> None:
    """Write a sparse model without the experts that a plan never runs, and measure both.

    The first half of the text tells which experts are used; on it the smaller model gives the same
    outputs, or nothing is written. The second half tells what it loses on text that it has not
    seen, where experts that remain may run in place of removed ones. The more text, the fewer
    experts are removed and the less it loses elsewhere. If all experts are used, the model is
    written whole.

    Args:
        ckpt_path: checkpoint of `fit`.
        plan: JSON file of the selection plan, such as `calibrate` writes.
        output: directory of the sparse model; an earlier one there is replaced.
        quantization: "int8" puts the routed experts into 8 bits with bitsandbytes.
        options: of the text, see `text_for`.

    Raises:
        ValueError: if the plan is not one for this model, the checkpoint or the text is not fit for
            it, or the outputs are not the same.
        FileExistsError: if something else than a sparse model is at `output`.
    """
    check_free(Path(output))
    loaded = load_decoder(ckpt_path)
    decoder = loaded.decoder
    selections = read_plan(plan, decoder)
    text = text_for(loaded, **options)
    used_on, judged_on = text.halves()
    with Console(stderr=True).status("reading the text with all experts there") as status:
        whole = _compiled(loaded, decoder, selections, quantization)
        remaining = used_experts(whole, selections, used_on)
        smaller = without_others(decoder, remaining)
        pruned = _compiled(loaded, smaller, selections, quantization)
        status.update("comparing all outputs")
        proof = prove(whole, pruned, selections, used_on)
        if not proof.holds:
            raise ValueError(f"without unused experts the outputs are others: {_spelled(proof)}")
        status.update("reading the other half")
        counts = count_parameters(decoder)
        before, after = (
            evaluate_plan(model, selections, judged_on, counts).loss for model in (whole, pruned)
        )
    pruned.save(output)
    Console().print(_table(decoder, remaining))
    if remaining_experts(smaller) is None:
        print("All experts run on this text, so none was removed.")
    print(f"Parameters: {_size(decoder):,} before, {_size(smaller):,} after.")
    print(
        f"Bytes of weights: {whole.report().n_bytes:,} before, {pruned.report().n_bytes:,} after."
    )
    print(f"On the {proof.n_tokens:,} tokens of the first half: {_spelled(proof)}.")
    print(f"On the other half the loss is {before:.4f} before, {after:.4f} after.")
    print(f"The sparse model is in {Path(output)}")


def _compiled(
    loaded: LoadedDecoder,
    decoder: Decoder,
    plan: SelectionPlan,
    quantization: Quantization | None,
) -> SparseModel:
    return compile_sparse(
        decoder,
        plan,
        quantization=quantization,
        context_length=loaded.context,
        tokenizer=loaded.tokenizer,
    )


def _spelled(proof: Proof) -> str:
    return (
        f"{proof.other_choices:,} of {proof.n_choices:,} choices of experts differ, "
        f"logits differ by {proof.difference:.3g} at the most, the largest is "
        f"{proof.largest_logit:.3g}"
    )


def _table(decoder: Decoder, remaining: Remaining) -> Table:
    table = Table("layer", "experts removed", "attention experts removed")
    kinds = zip(decoder.plan_sizes, remaining, strict=True)
    columns = [
        [_removed(*layer) for layer in zip(sizes, numbers, strict=True)] for sizes, numbers in kinds
    ]
    for layer, cells in enumerate(zip(*columns, strict=True)):
        table.add_row(str(layer), *cells)
    return table


def _removed(n_experts: int | None, remaining: tuple[int, ...] | None) -> str:
    if n_experts is None:
        return "no router"
    return f"{0 if remaining is None else n_experts - len(remaining)} of {n_experts}"


def _size(decoder: Decoder) -> int:
    return sum(parameter.numel() for parameter in decoder.parameters())
