"""Which kernels on disk are those of parts that were met before: found without tracing the parts.

Tracing takes seconds, in which another process would be started while the kernels are there.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress

from lightning_dsmoe.files import atomic_path
from lightning_dsmoe.inference.engine.decode.aot_cache import (
    Kernel,
    Part,
    ensure_private_folder,
    kernel_folder,
    load_kernel,
    only_we_can_write,
)
from lightning_dsmoe.inference.engine.decode.packed_parts import CannotBePacked, pack_parts

_FILE = re.compile(r"[0-9a-f]{40}\.pt2")


def name_of(parts: Sequence[Part]) -> str | None:
    """The name under which the kernels of parts are remembered; None if they are not."""
    try:
        return pack_parts(parts).name
    except CannotBePacked:
        return None


def keep(name: str, files: Sequence[str]) -> None:
    """Remember the kernels of parts.

    Args:
        name: name of the parts.
        files: name of the file of each part's kernel.
    """
    # Without it kernels are found all the same, by tracing: as in a cache that cannot be written.
    with suppress(OSError), atomic_path(kernel_folder() / f"{name}.json") as temporary:
        temporary.touch(mode=0o644)  # whatever the umask: what others can write to is not read
        temporary.write_text(json.dumps(list(files)), encoding="utf-8")


def recall(parts: Sequence[Part]) -> list[Kernel] | None:
    """Load the kernels of parts; None if they are not remembered, gone or damaged."""
    name = name_of(parts)
    if name is None:
        return None
    path = kernel_folder() / f"{name}.json"
    device = parts[0].inputs[0].device
    try:
        ensure_private_folder(kernel_folder())
        if not only_we_can_write(path.stat()):
            return None
        files = json.loads(path.read_text(encoding="utf-8"))
        if len(files) != len(parts) or not all(_FILE.fullmatch(file) for file in files):
            return None
        loaded = {file: load_kernel(kernel_folder() / file, device) for file in set(files)}
        return [loaded[file] for file in files]
    except Exception:  # they are compiled anew, whatever is wrong with them
        return None
