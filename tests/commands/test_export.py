from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_dsmoe import (
    Decoder,
    GLUExperts,
    GroupedQueryAttention,
    MixtureOfExperts,
    SelectionPlan,
    Threshold,
    TopK,
    compile_sparse,
)
from lightning_dsmoe.commands.export import export
from lightning_dsmoe.commands.import_ import checkpoint_of
from lightning_dsmoe.tokenizers import ByteTokenizer

PLAN = SelectionPlan(experts=TopK(2))


@pytest.fixture
def decoder() -> Decoder:
    swiglu = partial(GLUExperts, activation="silu")
    return Decoder(
        256,
        16,
        2,
        attention=partial(GroupedQueryAttention, n_heads=4, n_kv_heads=2, d_head=4),
        feed_forward=partial(MixtureOfExperts, n_experts=4, d_expert=8, experts=swiglu),
    ).eval()


def test_a_checkpoint(decoder: Decoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(checkpoint_of(decoder, ByteTokenizer(), 33), tmp_path / "last.ckpt")
    PLAN.save(tmp_path / "plan.json")
    export(
        str(tmp_path / "last.ckpt"),
        plan=str(tmp_path / "plan.json"),
        output=str(tmp_path / "out"),
    )
    assert "holds a qwen2_moe model" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_an_artifact_and_what_was_measured(decoder: Decoder, tmp_path: Path) -> None:
    certificate = {"sparse_loss": 1.41, "relative_gap": -0.0005}
    (tmp_path / "f.png").write_bytes(b"picture")
    compile_sparse(decoder, PLAN).save(
        tmp_path / "sparse", certificate=certificate, frontier=tmp_path / "f.png"
    )
    export(artifact=str(tmp_path / "sparse"), output=str(tmp_path / "out"))
    assert "0.05 % below" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "frontier.png").is_file()
    SelectionPlan(experts=TopK(1)).save(tmp_path / "other.json")
    export(
        artifact=str(tmp_path / "sparse"),
        plan=str(tmp_path / "other.json"),
        output=str(tmp_path / "out"),
    )
    assert "below" not in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "frontier.png").exists()


def test_refusals(decoder: Decoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either --ckpt_path or --artifact"):
        export()
    compile_sparse(decoder, SelectionPlan(Threshold(0.5))).save(tmp_path / "sparse")
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        export(artifact=str(tmp_path / "sparse"), to="qwen2_moe", output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
