"""Decoding by the engine of this library against the exported class in transformers.

    pip install -e '.[hf]'
    python -m benchmarks.speed.exported --threads 1 --json exported.json
    python -m benchmarks.speed.exported --tiny --rounds 2  # a trial in seconds, nothing compiled

Both sides have the same weights and run the same experts: the exported class is read from a
directory that was written for it, and their most probable tokens are compared too. They alternate
in this process, as in `benchmarks.speed.peers`: each step reads one token more of each of 1 and 8
sequences into a KV cache and takes the most probable next one, in float32 on the CPU. Ratios of
speed are medians over rounds of the ratio within a round; above 1, the engine is faster.

* P3 runs 2 of 8 attention experts and 3 of 32 feed-forward experts with GELU; P1, by `--plans P1`,
  all and 11.
* The threshold plan runs what the router finds, in both kinds of layers.
* Exported, compiled: decoding steps under torch.compile with a static cache; it computes every
  expert, under gates of zero where one does not run, and thus the same work under every plan. It
  takes minutes to compile, so that it runs under P3 with one sequence alone.
"""

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.speed.decoding import Ours, Reader
from benchmarks.speed.peer_models import FULL, TINY, CompiledPeer, Peer, ds_moe, parameters
from benchmarks.speed.peers import BATCH_SIZES, CAPACITY, PROMPT, Group, compare_group, table
from benchmarks.timing import machine
from lightning_dsmoe import Decoder, SelectionPlan, Threshold, TopK
from lightning_dsmoe.hugging_face.own_class import write_own_class
from lightning_dsmoe.hugging_face.own_class.modeling_dsmoe import DSMoEForCausalLM
from lightning_dsmoe.inference import SwitchPoints, compile_sparse

PLANS = {
    "P1": SelectionPlan(experts=TopK(11)),
    "P3": SelectionPlan(experts=TopK(3), attention=TopK(2)),
    "threshold": SelectionPlan(experts=Threshold(1.0), attention=Threshold(1.0)),
}
COMPILED = ("P3", 1)
"""The plan and the number of sequences with which the exported class is compiled too."""


def main() -> None:
    """Measure everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="threads of torch; its default if left out")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each comparison")
    parser.add_argument("--tiny", action="store_true", help="two layers of width 64, as a trial")
    parser.add_argument("--plans", nargs="*", choices=PLANS, default=["P3", "threshold"])
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("error", message="decoding runs uncompiled")
    torch.compiler.config.recompile_limit = 16  # some paths compile anew for each of 12 layers
    torch.compiler.config.fail_on_recompile_limit_hit = True  # instead of going on uncompiled
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    size = TINY if options.tiny else FULL
    decoder = ds_moe(size)
    results: dict[str, Any] = {
        "machine": machine() | {"transformers": transformers.__version__},
        "parameters": {"DS-MoE, GELU": parameters(decoder)},
        "decoding": [],
    }
    for name in options.plans:
        for batch_size in BATCH_SIZES:
            group = plan_group(decoder, name, batch_size, compiled=not options.tiny)
            rows = compare_group(
                group, size.vocabulary, batch_size=batch_size, rounds=options.rounds
            )
            check_tokens(group, {row.get("side") for row in rows}, size.vocabulary, batch_size)
            results["decoding"] += rows
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def plan_group(decoder: Decoder, name: str, batch_size: int, *, compiled: bool) -> Group:
    """The engine and the exported class under one plan."""
    plan = PLANS[name]
    points = SwitchPoints() if compiled else SwitchPoints(gather_up_to=0)
    engine = Ours(compile_sparse(decoder, plan, switch_points=points), plan, CAPACITY)
    model = exported(decoder, plan)
    peer = Peer(model)
    peers: dict[str, Callable[[], Reader]] = {f"{name}, exported": lambda: peer}
    if compiled and (name, batch_size) == COMPILED:
        compiled_peer = CompiledPeer(model, CAPACITY)  # one, since each compiles anew
        peers[f"{name}, exported, compiled"] = lambda: compiled_peer
    return Group({f"{name}, engine": lambda: engine}, peers, {})


def check_tokens(group: Group, failed: set[str | None], vocabulary: int, batch_size: int) -> None:
    """Raise an AssertionError unless all sides that run find the same tokens most probable."""
    text_BT = torch.randint(vocabulary, (batch_size, CAPACITY))
    # Made as those that were timed, or the compiled side would compile again.
    tokens_TB1 = [tokens_B1.clone() for tokens_B1 in text_BT.split(1, dim=1)]
    found: dict[str, list[list[int]]] = {}
    for name, make in (group.ours | group.peers).items():
        if name not in failed:
            reader = make()
            with torch.inference_mode():
                reader.start(text_BT[:, :PROMPT])
                found[name] = [
                    reader.step(tokens_B1).tolist() for tokens_B1 in tokens_TB1[PROMPT : PROMPT + 4]
                ]
    expected = next(iter(found.values()))
    assert all(tokens == expected for tokens in found.values()), found


def exported(decoder: Decoder, plan: SelectionPlan) -> PreTrainedModel:
    """The class of transformers with the weights of a decoder, by way of a directory."""
    with tempfile.TemporaryDirectory() as folder:
        write_own_class(decoder, plan, folder)
        model = DSMoEForCausalLM.from_pretrained(folder)
    return model.eval().requires_grad_(False)


if __name__ == "__main__":
    main()
