"""Expected memory, communication and MFU of the paper's models on many GPUs.

    python -m benchmarks.scale --model 1b 3b 6b --gpus 8 64 256 1024 --gpu h100

Nothing is measured: parameters, operations and activations are counted on tensors without memory,
and set against published peaks and link speeds. `costs.py` has all assumptions.
"""

import argparse

from benchmarks.scale.costs import (
    GPUS,
    KERNELS,
    LINKS,
    Gpu,
    accumulation,
    ddp_traffic,
    fsdp2_traffic,
    memory,
    mfu,
)
from benchmarks.scale.counts import Counts, paper_counts

SIZES = ("1b", "3b", "6b")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=_FIRST_LINE)
    parser.add_argument("--model", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--gpus", nargs="+", type=_number, default=[8, 64, 256, 1024])
    parser.add_argument("--batch_size", type=_number, help="of one GPU; by default as configured")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    options = parser.parse_args()
    gpu = GPUS[options.gpu]
    print(f"{gpu.name}; kernels at {KERNELS:.0%} of the peak, links at {LINKS:.0%}; not measured\n")
    print(HEAD)
    for size in options.model:
        counts = paper_counts(size, options.batch_size)
        for gpus in options.gpus:
            for sharded in (False, True):
                print(row(counts, gpu, gpus, sharded=sharded))


HEAD = """\
| model | GPUs | strategy | tokens a step | GB a GPU, kept / recomputed activations \
| GB sent a step and GPU | losses' sums, kB | MFU at most, hidden / exposed |
|---|---|---|---|---|---|---|---|"""
_FIRST_LINE = __doc__.splitlines()[0]


def row(counts: Counts, gpu: Gpu, gpus: int, *, sharded: bool) -> str:
    """One line of the table; the MFU is that of the setting that fits, kept before recomputed."""
    traffic = (fsdp2_traffic if sharded else ddp_traffic)(counts, gpus)
    sizes = {
        recompute: memory(counts, gpus, sharded=sharded, recompute=recompute)
        for recompute in (False, True)
    }
    fitting = [recompute for recompute, size in sizes.items() if size <= gpu.memory]
    expected = "does not fit"
    if fitting:
        found = mfu(counts, gpu, gpus, traffic, recompute=fitting[0], sharded=sharded)
        expected = f"{found.hidden:.0%} / {found.exposed:.0%}"
    batches = accumulation(counts, gpus)
    tokens = gpus * batches * counts.batch_size * counts.context
    return (
        f"| {counts.name} | {gpus:,} | {'FSDP2' if sharded else 'DDP'} | {tokens / 1e6:.2f} M "
        f"| {sizes[False] / 1e9:.1f} / {sizes[True] / 1e9:.1f} "
        f"| {traffic.per_gpu(gpus) / 1e9:.1f} | {4 * batches * counts.router_sums / 1e3:.1f} "
        f"| {expected} |"
    )


def _number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


if __name__ == "__main__":
    main()
