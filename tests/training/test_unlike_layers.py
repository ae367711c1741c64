"""Models of the command line whose layers differ: configuration, checkpoint, loading, resuming."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from lightning_dsmoe.attention import Llama3RopeScaling
from lightning_dsmoe.cli import cli_main
from lightning_dsmoe.experts import FeedForward, MixtureOfExperts
from lightning_dsmoe.serialization.architecture import describe_decoder
from lightning_dsmoe.serialization.checkpoint import load_decoder
from lightning_dsmoe.training.language_model import DSMoELanguageModel

MODEL = {
    "class_path": "lightning_dsmoe.DSMoELanguageModel",
    "init_args": {
        "d_model": 16,
        "n_layers": 2,
        "attention": {
            "class_path": "lightning_dsmoe.GroupedQueryAttention",
            "init_args": {
                "n_heads": 4,
                "n_kv_heads": 2,
                "d_head": 8,
                "qk_norm": "projection",
                "rotary_fraction": 0.5,
                "rope_scaling": {
                    "class_path": "lightning_dsmoe.Llama3RopeScaling",
                    "init_args": {
                        "factor": 8.0,
                        "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0,
                        "original_max_positions": 64,
                    },
                },
            },
        },
        "feed_forward": [
            {"class_path": "lightning_dsmoe.FeedForward", "init_args": {"d_hidden": 8}},
            {
                "class_path": "lightning_dsmoe.MixtureOfExperts",
                "init_args": {"n_experts": 4, "d_expert": 8, "d_shared": 8, "shared_gate": True},
            },
        ],
    },
}


def config(folder: Path) -> dict[str, object]:
    text = folder / "text.txt"
    text.write_text("what the model reads\n" * 100)
    data = {"files": [str(text)], "tokenizer": "byte", "context": 16, "batch_size": 4}
    last = {"dirpath": str(folder / "checkpoints"), "save_last": True}
    return {
        "seed_everything": 1,
        "model": MODEL,
        "data": {
            "class_path": "lightning_dsmoe.TextDataModule",
            "init_args": {**data, "cache_dir": str(folder)},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_progress_bar": False,
            "default_root_dir": str(folder),
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": last}
            ],
        },
    }


@pytest.mark.slow
def test_from_a_configuration_to_a_checkpoint_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, last = tmp_path / "config.yaml", tmp_path / "checkpoints" / "last.ckpt"
    path.write_text(json.dumps(config(tmp_path)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own
        warnings.filterwarnings("error", "(?s).*Unable to serialize")
        trained = cli_main(["fit", "-c", str(path)]).model
        again = ["--model.init_args.attention.init_args.causal=true", "--trainer.max_steps=4"]
        cli_main(["fit", "-c", str(path), *again, f"--ckpt_path={last}"])
    loaded = DSMoELanguageModel.load_from_checkpoint(last)
    layers = [block.feed_forward for block in loaded.decoder.blocks]
    assert [type(layer) for layer in layers] == [FeedForward, MixtureOfExperts]
    scaling = loaded.decoder.blocks[1].attention.rope_scaling
    assert scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 64)
    decoder = load_decoder(last).decoder
    assert describe_decoder(decoder) == describe_decoder(trained.decoder)
    assert isinstance(describe_decoder(decoder)["feed_forward"], list)
    tokens = torch.randint(256, (2, 9))
    assert torch.equal(decoder(tokens).logits, loaded(tokens).logits)
