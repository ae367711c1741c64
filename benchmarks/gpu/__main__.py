"""What there is to measure on one GPU: tests, inference, training and a model's quality.

    python -m benchmarks.gpu --out results --text tinyshakespeare.txt
    python -m benchmarks.gpu --out results --part decode

It runs from the sources, with the packages of the Python that it is called with, on the first GPU.
Each part writes `PART.json` and a table, `PART.md`, anew after each measurement, so that a run cut
off keeps what it has; both name the card and the versions. Each part takes under eight minutes, and
all of them about three quarters of an hour: with a GPU at hand for less, name those that matter.
`python -m benchmarks.gpu.results FOLDER` makes the tables of the documentation from the files.

* tests: `pytest -m gpu`; the ends of its output go to `tests.txt`.
* decode, prefill: the dense twin, all experts and plans in the engine, 100 M parameters and the
  paper's 1B and 6B shapes, bfloat16; bytes of active weights a second beside those of a copy.
* sweep: 1 to 4,096 sequences, sparse over dense, and the lowest ratio.
* int8: routed experts in 8 bits against bfloat16.
* paper: its throughput table, 1B, 3B and 6B with their twins and three models of transformers.
* training: steps of the 1B shape, of its dense twin and of a sparsely trained model of its size,
  blocks compiled or not, with the MFU.
* quality: nanoGPT's recipe of 10.7 M parameters as DS-MoE, seed after seed, on the text given.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SECONDS = {
    "tests": 300,
    "decode": 330,
    "prefill": 240,
    "sweep": 360,
    "int8": 240,
    "paper": 400,
    "training": 360,
    "quality": 400,
}
"""After which a part begins nothing new."""
HARD_LIMIT = 470
"""Seconds after which a part is ended whatever it does; the files are whole at any time."""
ENGINE = ("numpy", "einops", "rich", "safetensors", "torchmetrics", "yaml")
NEEDS = {
    "tests": ("pytest",),
    "decode": ENGINE,
    "prefill": ENGINE,
    "sweep": ENGINE,
    "int8": ENGINE,
    "paper": (*ENGINE, "transformers"),
    "training": (*ENGINE, "lightning"),
    "quality": (*ENGINE, "lightning", "jsonargparse", "docstring_parser", "typeshed_client"),
}
"""Packages by the names that they are imported by; tests fail one by one without theirs."""
MODULES = {
    "tests": "benchmarks.gpu.tests",
    "decode": "benchmarks.gpu.inference",
    "prefill": "benchmarks.gpu.inference",
    "sweep": "benchmarks.gpu.sweep",
    "int8": "benchmarks.gpu.int8",
    "paper": "benchmarks.gpu.paper",
    "training": "benchmarks.gpu.training",
    "quality": "benchmarks.gpu.quality",
}
"""Imported when their part begins, as their packages may be missing."""


def main() -> None:
    """Carry out a part, or each part in a process of its own."""
    options = _options()
    if find_spec("torch") is None:
        sys.exit("benchmarks.gpu: torch is not installed here")
    import torch

    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: there is no CUDA GPU here, and nothing to measure without one")
    parts = [options.part] if options.part else list(NEEDS)
    if options.text is None and "quality" in parts:
        print("benchmarks.gpu: quality is left out, there is no --text to train on", flush=True)
        parts.remove("quality")
    able = [part for part in parts if not missing(part)]
    if able != parts:
        left_out = (f"{p} without {', '.join(missing(p))}" for p in parts if p not in able)
        print(f"benchmarks.gpu: packages are missing, left out: {'; '.join(left_out)}", flush=True)
    if options.part is None:
        words = [f"--out={options.out}", *([f"--text={options.text}"] if options.text else [])]
        command = [sys.executable, "-m", "benchmarks.gpu", *words]
        done = [subprocess.run([*command, f"--part={part}"], check=False) for part in able]
        codes = [each.returncode for each in done]
    else:
        threading.Thread(target=_end_at_the_limit, daemon=True).start()
        codes = [measure(part, torch.device("cuda"), options.out, options.text) for part in able]
    sys.exit(1 if able != parts or any(codes) else 0)


def missing(part: str) -> list[str]:
    """Packages that a part needs and this Python does not have."""
    return [name for name in NEEDS[part] if find_spec(name) is None]


def measure(part: str, device: "torch.device", out: Path, text: Path | None) -> int:
    """Carry out a part; gives the number of measurements that failed.

    Args:
        part: its name.
        device: where to measure.
        out: folder of the results.
        text: what to train on for quality.
    """
    from benchmarks.gpu.record import ROOT, Record, about, carry_out

    until = time.monotonic() + SECONDS[part]
    module = import_module(MODULES[part])
    record = Record(out, part, about(device), notes=module.NOTES)
    if part == "tests":
        todo = module.files_one_by_one(ROOT / "tests", out / "tests.txt", until)
    elif part == "quality":
        todo = module.quality(text, out / "quality_runs.json", until, record.add)
    else:
        todo = getattr(module, part)(device, until)
    carry_out(todo, record, until=until)
    return record.failures


def _end_at_the_limit() -> None:
    time.sleep(HARD_LIMIT)
    print(f"benchmarks.gpu: ended after {HARD_LIMIT} s, what was under way is lost", flush=True)
    os._exit(1)  # also out of a call that does not return


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=NEEDS, help="by default all, in this order")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--text", type=Path, help="trained on for quality: tinyshakespeare.txt")
    options = parser.parse_args()
    if options.part == "quality" and options.text is None:
        parser.error("--part quality needs --text")
    if options.text is not None and not options.text.is_file():
        parser.error(f"--text: there is no file {options.text}")
    return options


if __name__ == "__main__":
    main()
