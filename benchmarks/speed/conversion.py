"""Memory and minutes of importing a dense model of transformers, exporting and upcycling it.

    python -m benchmarks.speed.conversion --millions 200

Each direction runs in a process of its own, on Linux. Its peak is the most memory that the process
has during it, less what it has before, over the bytes of the model, whose weights are bfloat16.
Every direction begins with files; those of exporting hold a decoder, which is read first.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.timing import machine
from lightning_dsmoe import import_hf, upcycle
from lightning_dsmoe.hugging_face.export_hf import export_hf
from lightning_dsmoe.serialization.shards import Part, write_shards
from lightning_dsmoe.upcycling import save_upcycled
from lightning_dsmoe.upcycling.source import load_source

_SHAPES = {1000: (2048, 14, 8192, 32), 200: (1024, 10, 4096, 16), 2: (64, 2, 256, 4)}
"""Width, layers, neurons and heads, by millions of parameters, about."""
_VOCABULARY = 32000
_N_EXPERTS = 8
_DIRECTIONS = ("import", "export", "back", "upcycle")


def main() -> None:
    """Make the model, run all directions and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, choices=_SHAPES, default=1000)
    parser.add_argument("--direction", choices=_DIRECTIONS, help="run this one alone")
    parser.add_argument("--folder", type=Path, help="where the models are")
    options = parser.parse_args()
    if options.direction:
        run(options.direction, options.folder)
        return
    print(f"{machine()}\n\n| direction | peak memory over the model | minutes |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_llama(folder / "dense", *_SHAPES[options.millions])
        for direction in _DIRECTIONS:
            words = ["--direction", direction, "--folder", name]
            command = [sys.executable, "-m", "benchmarks.speed.conversion", *words]
            measured = json.loads(subprocess.run(command, check=True, stdout=-1).stdout)
            share = measured["peak"] / measured["bytes"]
            print(f"| {direction} | {share:.2f} | {measured['seconds'] / 60:.2g} |", flush=True)


def run(direction: str, folder: Path) -> None:
    """Run one direction, and print its peak memory and time as JSON."""
    if direction == "upcycle":
        from transformers import LlamaForCausalLM  # loads its modules
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the imports
    base, start = _kilobytes("VmRSS"), time.perf_counter()
    if direction == "import":
        model: nn.Module = import_hf(folder / "dense", n_experts=_N_EXPERTS)
    elif direction == "export":
        model = torch.load(folder / "decoder.pt", weights_only=False)  # written below
        start = time.perf_counter()
        export_hf(model, folder / "mixtral", to="auto")
    elif direction == "back":
        model = import_hf(folder / "mixtral")
    else:
        model = load_source(folder / "dense")
        assert isinstance(model, LlamaForCausalLM)
        upcycle(model, _N_EXPERTS)
        save_upcycled(model, folder / "upcycled")
    seconds = time.perf_counter() - start
    peak = 1024 * (_kilobytes("VmHWM") - base)
    n_bytes = sum(parameter.nbytes for parameter in model.parameters())
    print(json.dumps({"peak": peak, "bytes": n_bytes, "seconds": seconds}), flush=True)
    if direction == "import":
        torch.save(model, folder / "decoder.pt")


def _kilobytes(field: str) -> int:
    """A number of the process: VmRSS is what it has in memory, VmHWM the most that it had."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    [line] = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1])


def write_llama(folder: Path, width: int, n_layers: int, n_neurons: int, n_heads: int) -> None:
    """A directory of a dense model with random weights, as many KV heads as query heads.

    So its attention stays plain, and the exported class is one of transformers.
    """
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _VOCABULARY,
        "hidden_size": width,
        "intermediate_size": n_neurons,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (_VOCABULARY, width), "model.norm.weight": (width,)}
    for layer in range(n_layers):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{p}_proj.weight": (width, width) for p in "qkvo"}
        shapes |= {f"{name}.mlp.{p}_proj.weight": (n_neurons, width) for p in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (width, n_neurons)
        shapes[f"{name}.input_layernorm.weight"] = (width,)
        shapes[f"{name}.post_attention_layernorm.weight"] = (width,)
    dtype = torch.bfloat16
    parts = [
        Part({name: torch.empty(shape, dtype=dtype, device="meta")}, partial(_drawn, shape))
        for name, shape in shapes.items()
    ]
    write_shards(folder, parts)


def _drawn(shape: tuple[int, ...]) -> list[torch.Tensor]:
    return [(0.02 * torch.randn(shape)).bfloat16()]


if __name__ == "__main__":
    main()
