"""Sparse models from checkpoints and plans."""

from pathlib import Path

from rich.console import Console

from lightning_dsmoe.commands.evaluation_setup import read_plan
from lightning_dsmoe.inference import compile_sparse, load_decoder
from lightning_dsmoe.inference.artifact.directory import check_free
from lightning_dsmoe.inference.engine.weights.packing import Quantization


def compile(  # a tool has the name of its command
    ckpt_path: str,
    plan: str,
    quantization: Quantization | None = None,
    output: str = "sparse",
) -> None:
    """Write a checkpoint as a sparse model, which runs the experts of a plan only.

    All experts stay in it, so that other plans can run too; `prune` removes those that a plan never
    runs.

    Args:
        ckpt_path: checkpoint of `fit`.
        plan: JSON file of the selection plan, such as `calibrate` writes.
        quantization: "int8" quantizes the routed experts to 8 bits with bitsandbytes.
        output: directory of the sparse model; an earlier one there is replaced.

    Raises:
        ValueError: if the checkpoint is invalid, the plan does not match the model, or `output`
            cannot be written.
        FileExistsError: if something else than a sparse model is at `output`.
    """
    check_free(Path(output))
    loaded = load_decoder(ckpt_path)
    chosen = read_plan(plan, loaded.decoder)
    with Console(stderr=True).status(f"writing {output}"):
        model = compile_sparse(loaded, chosen, quantization=quantization)
        model.save(output)
    size = model.report().n_bytes
    print(f"{output} holds a sparse model of {size / 2**20:.3g} MiB. To try it:")
    print(f"lightning-dsmoe generate --artifact {output}")
