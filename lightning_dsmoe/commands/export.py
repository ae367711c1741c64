"""Models as directories for transformers."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_dsmoe.commands.evaluation_setup import read_plan
from lightning_dsmoe.files import read_json
from lightning_dsmoe.hugging_face.export_directory import check_replaceable
from lightning_dsmoe.hugging_face.export_hf import export_hf
from lightning_dsmoe.hugging_face.targets import OWN_CLASS, Target
from lightning_dsmoe.inference import SparseModel, load_decoder, load_sparse
from lightning_dsmoe.inference.artifact.hashes import CERTIFICATE, FRONTIER

_COLUMNS = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())


def export(
    ckpt_path: str | None = None,
    artifact: str | None = None,
    to: Target = "auto",
    plan: str | None = None,
    output: str = "exported",
) -> None:
    """Write a model as a directory that transformers reads, with the same logits.

    A class of transformers is written where one computes exactly what the model does under its
    plan; everything else goes to a class of this library, whose code the directory holds. Where the
    class that is asked for would compute something else, every reason is named and nothing is
    written.

    Args:
        ckpt_path: checkpoint of `fit`; all its experts run unless there is a plan.
        artifact: directory of a sparse model, instead of a checkpoint.
        to: class of transformers by its model_type, dsmoe for that of this library, or auto for
            the first that is exact.
        plan: JSON file of the selection plan; by default the model's own.
        output: directory to write; an earlier export there is replaced.

    Raises:
        ValueError: if not exactly one of ckpt_path and artifact is given, the plan does not match
            the model, or the class would compute something else.
        FileExistsError: if something else than an export is at `output`.
    """
    if (ckpt_path is None) == (artifact is None):
        raise ValueError("export needs either --ckpt_path or --artifact")
    check_replaceable(Path(output))
    model = load_sparse(str(artifact)) if ckpt_path is None else load_decoder(ckpt_path)
    given = None if plan is None else read_plan(plan, model.decoder)
    certificate = frontier = None
    if isinstance(model, SparseModel) and given in (None, model.plan):
        # Of another plan they say nothing.
        folder = Path(str(artifact))
        if (folder / CERTIFICATE).is_file():
            certificate = read_json(folder / CERTIFICATE)
        if (folder / FRONTIER).is_file():
            frontier = folder / FRONTIER
    with Progress(*_COLUMNS, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"writing {output}")
        written = export_hf(
            model,
            output,
            to=to,
            plan=given,
            certificate=certificate,
            frontier=frontier,
            on_bytes=lambda done, total: progress.update(task, completed=done, total=total),
        )
    trust = ", trust_remote_code=True" if written == OWN_CLASS else ""
    print(f"{output} holds a {written} model:")
    print(f'AutoModelForCausalLM.from_pretrained("{output}"{trust})')
