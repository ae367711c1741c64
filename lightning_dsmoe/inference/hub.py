"""Sparse models on the Hugging Face Hub, by the names that huggingface_hub's mixin has."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, Self

from lightning_dsmoe.inference.artifact.directory import check_files
from lightning_dsmoe.inference.artifact.hashes import (
    CARD,
    CERTIFICATE,
    CONFIG,
    FRONTIER,
    PLAN,
    SUMS,
    WEIGHTS,
)

_FILES = [CARD, CERTIFICATE, CONFIG, FRONTIER, PLAN, SUMS, WEIGHTS]
"""All that is sent and fetched: what else lies in a folder may be private, or somebody's code."""


class OnHub:
    """Saving to and loading from the Hub, for a class with `save(path)` and `load(path)`."""

    save: Callable[..., None]
    load: Callable[..., Any]

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        certificate: dict[str, Any] | None = None,
        frontier: str | Path | None = None,
        **options: Any,
    ) -> str | None:
        """Write an artifact directory, as `save` does, and upload it if asked to.

        Args:
            save_directory: the directory.
            repo_id: repository on the Hub, such as "me/my-model"; by default the directory's name.
            push_to_hub: upload the directory.
            certificate: measurements of this model; plain data.
            frontier: a picture of loss against active share for the model card.
            options: those of `upload_artifact`.

        Returns:
            The address of the commit, None without an upload.
        """
        self.save(save_directory, certificate=certificate, frontier=frontier)
        if not push_to_hub:
            return None
        return upload_artifact(save_directory, repo_id or Path(save_directory).name, **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        certificate: dict[str, Any] | None = None,
        frontier: str | Path | None = None,
        **options: Any,
    ) -> str:
        """Upload the model as an artifact; one in a directory goes with `upload_artifact`.

        Args:
            repo_id: repository on the Hub, such as "me/my-model"; made if it does not exist.
            certificate: measurements of this model; plain data.
            frontier: a picture of loss against active share for the model card.
            options: those of `upload_artifact`.

        Returns:
            The address of the commit.
        """
        with TemporaryDirectory() as folder:
            path = Path(folder, "model")
            self.save(path, certificate=certificate, frontier=frontier)
            return upload_artifact(path, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **options: Any,
    ) -> Self:
        """Load an artifact from a directory, or else from the Hub; verified as `load` does.

        Args:
            pretrained_model_name_or_path: a directory, or a repository such as "me/my-model".
            revision: branch, tag or commit.
            token: access token; None takes that of `hf auth login`.
            cache_dir: where downloads are kept.
            force_download: download again what is in the cache.
            local_files_only: take the model from the cache alone.
            options: those of `load`.

        Raises:
            ImportError: if huggingface_hub is needed and not installed.
            FileNotFoundError: if there is no such artifact.
            ValueError: if a file was changed or is invalid.
        """
        path = Path(pretrained_model_name_or_path)
        if not path.is_dir():
            folder = _hub().snapshot_download(
                str(pretrained_model_name_or_path),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                allow_patterns=_FILES,
            )
            path = Path(folder)
        found: Self = cls.load(path, **options)
        return found


def upload_artifact(
    directory: str | Path,
    repo_id: str,
    *,
    commit_message: str = "Upload a sparse model with lightning_dsmoe",
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
) -> str:
    """Upload an artifact directory with its certificate, card and picture, and nothing else in it.

    Args:
        directory: the artifact.
        repo_id: repository on the Hub, such as "me/my-model"; made if it does not exist.
        commit_message: of the commit.
        private: make a new repository private; None takes the owner's default.
        token: access token; None takes that of `hf auth login`.
        branch: branch to commit to; made if it does not exist.
        create_pr: open a pull request with the commit.

    Returns:
        The address of the commit.

    Raises:
        ImportError: if huggingface_hub is not installed.
        FileNotFoundError: if the directory is not an artifact.

    Examples:
        >>> upload_artifact("sparse_model", "me/my-model", private=True)  # doctest: +SKIP
    """
    check_files(Path(directory))
    api = _hub().HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if branch is not None:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=str(directory),
        commit_message=commit_message,
        revision=branch,
        create_pr=create_pr,
        allow_patterns=_FILES,
    )
    return str(commit.commit_url)


def _hub() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("the Hub needs: pip install 'lightning-dsmoe[hf]'") from error
    return huggingface_hub
