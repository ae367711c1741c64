"""Sparse models without the experts that a text never uses."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_dsmoe.analysis import evaluate_plan
from lightning_dsmoe.analysis.unused_experts import Proof, prove, used_experts
from lightning_dsmoe.commands.evaluation_setup import read_plan, text_for
from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference import Remaining, compile_sparse, load_decoder
from lightning_dsmoe.inference import prune as without_others
from lightning_dsmoe.inference.artifact.directory import check_free
from lightning_dsmoe.inference.engine.weights.packing import Quantization
from lightning_dsmoe.metrics import count_parameters
from lightning_dsmoe.serialization.pruning import remaining_experts
from lightning_dsmoe.units import compared


def prune(
    ckpt_path: str,
    plan: str,
    output: str = "pruned",
    quantization: Quantization | None = None,
    **options: Any,
) -> None:
    """Write a sparse model without the experts that its plan never runs on held-out text.

    The first half of the text decides which experts are unused. On it the pruned model must choose
    the same experts and give the same logits, or nothing is written. The second half is unseen:
    there experts that remain may run in place of removed ones, and the loss of both models is
    reported. The more text, the fewer experts are removed. If all experts are used, the whole model
    is written.

    Args:
        ckpt_path: checkpoint of `fit`.
        plan: JSON file of the selection plan, such as `calibrate` writes.
        output: directory of the sparse model; an earlier one there is replaced.
        quantization: "int8" quantizes the routed experts to 8 bits with bitsandbytes.
        options: of the text, see `text_for`.

    Raises:
        ValueError: if the plan does not match the model, the checkpoint or the text is invalid, or
            the outputs differ.
        FileExistsError: if something else than a sparse model is at `output`.
    """
    check_free(Path(output))
    loaded = load_decoder(ckpt_path)
    decoder = loaded.decoder
    selections = read_plan(plan, decoder)
    text = text_for(loaded, **options)
    used_on, judged_on = text.halves()
    with Console(stderr=True).status(
        "finding unused experts on the first half of the text"
    ) as status:
        whole = compile_sparse(loaded, selections, quantization=quantization)
        remaining = used_experts(whole, selections, used_on)
        smaller = without_others(decoder, remaining)
        rest = loaded._replace(decoder=smaller)
        pruned = compile_sparse(rest, selections, quantization=quantization)
        status.update("comparing choices of experts and logits")
        proof = prove(whole, pruned, selections, used_on)
        if not proof.holds:
            raise ValueError(f"without unused experts the outputs differ: {_format(proof)}")
        status.update("measuring both models on the second half")
        counts = count_parameters(decoder)
        before, after = (
            evaluate_plan(model, selections, judged_on, counts).loss for model in (whole, pruned)
        )
    pruned.save(output)
    Console().print(_table(decoder, remaining))
    if remaining_experts(smaller) is None:
        print("All experts run on this text, so none was removed.")
    size, rest_size = (sum(p.numel() for p in each.parameters()) for each in (decoder, smaller))
    print(f"Parameters: {size:,} before, {rest_size:,} after.")
    mib = [model.report().n_bytes / 2**20 for model in (whole, pruned)]
    print(f"Weights: {mib[0]:.3g} MiB before, {mib[1]:.3g} MiB after.")
    print(f"On the {proof.n_tokens:,} tokens of the first half: {_format(proof)}.")
    print(
        f"On the other half the loss is {before:.3f} nats per token before, {after:.3f} after "
        f"({compared(after / before - 1)})."
    )
    print(f"The sparse model is in {Path(output)}")


def _format(proof: Proof) -> str:
    return (
        f"{proof.other_choices:,} of {proof.n_choices:,} choices of experts differ, logits differ "
        f"by at most {proof.difference:.3g}, the largest is {proof.largest_logit:.3g}"
    )


def _table(decoder: Decoder, remaining: Remaining) -> Table:
    table = Table("layer", "experts removed", "attention experts removed")
    columns = (map(_removed, *kind) for kind in zip(decoder.plan_sizes, remaining, strict=True))
    for layer, cells in enumerate(zip(*columns, strict=True)):
        table.add_row(str(layer), *cells)
    return table


def _removed(n_experts: int | None, remaining: tuple[int, ...] | None) -> str:
    if n_experts is None:
        return "no router"
    return f"{0 if remaining is None else n_experts - len(remaining)} of {n_experts}"
