"""One file from the folder of a sharded checkpoint."""

import shutil
from pathlib import Path

from rich.console import Console

from lightning_dsmoe.files import check_file
from lightning_dsmoe.serialization.checkpoint import read_checkpoint
from lightning_dsmoe.serialization.sharded_folder import read_index


def consolidate(ckpt_path: str, output: str = "consolidated.ckpt") -> None:
    """Write one checkpoint file from the folder that a sharded run saved.

    The file is one as of a run that does not shard: it is loaded, compiled and exported as any
    other, and a run resumes from it on any number of processes, as it does from the folder. Every
    checksum is compared before anything is written. All of it has to fit into memory.

    Args:
        ckpt_path: folder that a sharded run has saved as a checkpoint, such as last.ckpt.
        output: file to write; an earlier file there is replaced.

    Raises:
        FileNotFoundError: if the folder is incomplete or not that of a sharded checkpoint.
        ValueError: if the checkpoint is a file already, `output` cannot be written, or a file of
            the folder is damaged or holds more than data.
        OSError: if there is not enough space for the file.
    """
    place = Path(output).expanduser()
    check_file(str(place) if output else output)
    folder = Path(ckpt_path).expanduser()
    if folder.is_file():
        raise ValueError(f"{ckpt_path} is one file already; there is nothing to consolidate")
    _check_space(place, _bytes(folder))
    from lightning_dsmoe.training.checkpoint_io import SafeCheckpointIO  # loads Lightning

    with Console(stderr=True).status(f"reading {ckpt_path}") as status:
        checkpoint = read_checkpoint(folder)
        status.update(f"writing {output}")
        SafeCheckpointIO().save_checkpoint(checkpoint, place)
    size = place.stat().st_size / 2**20
    print(f"{output} holds the checkpoint of step {checkpoint.get('global_step')}: {size:.3g} MiB.")


def _bytes(folder: Path) -> int:
    entries = read_index(folder).values()
    return sum(shard.place.length for entry in entries for shard in entry.shards)


def _check_space(place: Path, n_bytes: int) -> None:
    parent = next(each for each in place.absolute().parents if each.exists())
    if (free := shutil.disk_usage(parent).free) < n_bytes:
        raise OSError(
            f"{place} needs {n_bytes / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free there"
        )
