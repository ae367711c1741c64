"""Continues a text with a checkpoint or a sparse model."""

from itertools import chain

import torch

from lightning_dsmoe.commands.evaluation_setup import read_plan
from lightning_dsmoe.inference import SwitchPoints, compile_sparse, load_decoder, load_sparse
from lightning_dsmoe.routing import SelectionPlan


def generate(
    ckpt: str | None = None,
    artifact: str | None = None,
    prompt: str = "\n",
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 1234,
    stop: str | None = None,
    plan: str | None = None,
) -> None:
    """Generate text from a checkpoint or a sparse model.

    Args:
        ckpt: checkpoint of `fit`; all its experts run unless there is a plan.
        artifact: directory of a sparse model, instead of a checkpoint.
        prompt: text to continue.
        max_new_tokens: most tokens to add.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: sample from the k most probable tokens only.
        top_p: sample from the fewest most probable tokens with this much probability only.
        seed: seed of the sampling.
        stop: a text that ends the output.
        plan: JSON file of a selection plan; by default the model's own.

    Raises:
        ValueError: if not exactly one of ckpt and artifact is given, or an option is out of
            range.
    """
    if (ckpt is None) == (artifact is None):
        raise ValueError("generate needs either --ckpt or --artifact")
    if ckpt is None:
        model = load_sparse(str(artifact))
    else:
        trained = load_decoder(ckpt)
        dense = SelectionPlan.uniform(trained.decoder.n_layers)
        uncompiled = SwitchPoints(gather_up_to=0)  # one text is done before a step is compiled
        model = compile_sparse(trained, dense, switch_points=uncompiled)
    pieces = model.stream(
        prompt,
        max_new_tokens,
        plan=None if plan is None else read_plan(plan, model.decoder),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop,
        generator=torch.Generator().manual_seed(seed),
    )
    for piece in chain([prompt], pieces, ["\n"]):
        print(piece, end="", flush=True)
