"""The Hub, without a network: what is sent, and what is loaded of a download."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from lightning_dsmoe.inference import SparseModel, load_sparse, upload_artifact

ARTIFACT = {"README.md", "SHA256SUMS", "config.json", "model.safetensors", "plan.json"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Folders by repository, with what was said in an upload; downloads link to other files."""
    repositories: dict[str, Any] = {}

    def create_repo(self: Any, repo_id: str, **options: Any) -> Any:
        repositories[repo_id] = {"created": options, "token": self.token}
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self: Any, repo_id: str, **options: Any) -> None:
        repositories[repo_id]["branch"] = options

    def upload_folder(self: Any, *, repo_id: str, folder_path: str, **options: Any) -> Any:
        names = [path.name for path in Path(folder_path).iterdir()]
        sent = filter_repo_objects(names, allow_patterns=options.pop("allow_patterns"))
        files = {name: (Path(folder_path) / name).read_bytes() for name in sent}
        repositories[repo_id] |= {"files": files, "committed": options}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(repo_id: str, **options: Any) -> str:
        folder = tmp_path / "cache" / "snapshots" / "1"
        folder.mkdir(parents=True)
        for number, (name, content) in enumerate(repositories[repo_id]["files"].items()):
            (tmp_path / "cache" / str(number)).write_bytes(content)
            os.symlink(f"../../{number}", folder / name)
        repositories[repo_id]["downloaded"] = options
        return str(folder)

    for name, stub in (
        ("create_repo", create_repo),
        ("create_branch", create_branch),
        ("upload_folder", upload_folder),
    ):
        monkeypatch.setattr(huggingface_hub.HfApi, name, stub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return repositories


@pytest.fixture
def model(float_artifact: Path) -> SparseModel:
    return load_sparse(float_artifact)


def test_there_and_back(model: SparseModel, hub: dict[str, Any]) -> None:
    address = model.push_to_hub("me/model", private=True, token="hf_x", certificate={"kl": 0.5})
    assert address == "https://hub/me/model/commit/1"
    found = hub["me/model"]
    assert found["files"].keys() == {*ARTIFACT, "certificate.json"}
    assert found["created"] == {"private": True, "exist_ok": True}
    assert found["token"] == "hf_x"
    loaded = SparseModel.from_pretrained("me/model", revision="v1", token="hf_x")
    assert (found["downloaded"]["revision"], found["downloaded"]["token"]) == ("v1", "hf_x")
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded.logits(tokens), model.logits(tokens))
    assert loaded.plan == model.plan


def test_nothing_else_in_a_directory_is_sent(
    model: SparseModel, hub: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "my_model"
    assert model.save_pretrained(path) is None
    (path / "private.txt").write_text("secret")
    upload_artifact(path, "me/model", branch="next", create_pr=True)
    assert hub["me/model"]["files"].keys() == ARTIFACT
    assert hub["me/model"]["branch"] == {"branch": "next", "exist_ok": True}
    committed = hub["me/model"]["committed"]
    assert (committed["revision"], committed["create_pr"]) == ("next", True)
    model.save_pretrained(path, push_to_hub=True)
    assert "my_model" in hub
    assert SparseModel.from_pretrained(path).plan == model.plan


def test_a_changed_download_is_refused(model: SparseModel, hub: dict[str, Any]) -> None:
    model.push_to_hub("me/model")
    hub["me/model"]["files"]["plan.json"] += b" "
    with pytest.raises(ValueError, match="was changed"):
        SparseModel.from_pretrained("me/model")


def test_what_is_no_artifact_is_not_sent(hub: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"SHA256SUMS is missing"):
        upload_artifact(tmp_path, "me/model")
    assert not hub


def test_the_hub_reads_the_card(model: SparseModel) -> None:
    card = huggingface_hub.ModelCard(model.card({"kl": 0.5}))
    assert card.data.library_name == "lightning_dsmoe"
    assert card.data.pipeline_tag == "text-generation"
    assert "mixture-of-experts" in card.data.tags
    assert card.text.lstrip().startswith("# A sparse DS-MoE language model")
