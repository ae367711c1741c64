"""Exported directories: what they hold, what is refused, and that they stand alone."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_dsmoe import (
    GroupedQueryAttention,
    MixtureOfExperts,
    SelectionPlan,
    TopK,
)
from lightning_dsmoe.decoder import Block, TokenHead
from lightning_dsmoe.experts import MLPExperts
from lightning_dsmoe.hugging_face.export_hf import export_hf
from lightning_dsmoe.hugging_face.own_class import write_own_class
from lightning_dsmoe.hugging_face.own_class.write import own_tensors
from lightning_dsmoe.routing import LinearRouter, Selection
from lightning_dsmoe.tokenizers import ByteTokenizer
from tests.hugging_face.own_class.conftest import (
    VOCABULARY,
    Case,
    assert_close,
    decoder,
    exported,
    gpt,
    mixtures,
)


def test_files(tmp_path: Path) -> None:
    write_own_class(*mixtures(), tmp_path / "model", token_ids={"eos_token_id": 5})
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "configuration_dsmoe.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_dsmoe.py",
    ]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["DSMoEForCausalLM"]
    assert config["eos_token_id"] == 5
    selections = [each["feed_forward"]["mixture"]["selection"] for each in config["blocks"]]
    assert [each["kind"] for each in selections] == ["Threshold", "TopP", "Threshold"]


def test_weights_are_bit_equal(case: Case, tmp_path: Path) -> None:
    model = exported(case, tmp_path)
    theirs = model.state_dict()
    ours = own_tensors(case.decoder)
    for name, tensor in ours.items():
        assert torch.equal(theirs.pop(name), tensor), name
    assert set(theirs) <= {"lm_head.weight"}


class OtherRouter(LinearRouter):
    """A class of the user's own."""


class OtherExperts(MLPExperts):
    """A class of the user's own."""


@dataclass(frozen=True)
class NearBest(Selection):
    def mask(self, probs: Tensor) -> Tensor:
        return probs >= 0.5 * probs.amax(-1, keepdim=True)


def test_refusals_come_together_and_nothing_is_written(tmp_path: Path) -> None:
    attention = partial(GroupedQueryAttention, n_heads=2, n_kv_heads=1, d_head=4)
    experts = partial(
        MixtureOfExperts, n_experts=3, d_expert=4, router=OtherRouter, experts=OtherExperts
    )
    made = decoder(attention, experts, norm=nn.RMSNorm)
    made.blocks[1].feed_forward_norm = nn.GroupNorm(2, 24)
    made.head.double()
    made.embedding.double()
    with pytest.raises(ValueError, match="cannot hold") as raised:
        write_own_class(
            made,
            SelectionPlan(experts=NearBest()),
            tmp_path / "model",
            tokenizer=ByteTokenizer().to_dict(),
            token_ids={"pad_token_id": VOCABULARY, "unk_token_id": 1},
        )
    message = str(raised.value)
    for reason in (
        "blocks.0.feed_forward.router is a OtherRouter; it must be one of LinearRouter",
        "blocks.2.feed_forward.experts is a OtherExperts",
        "blocks.1.feed_forward_norm is a GroupNorm",
        "blocks.0, experts: the selection is a NearBest",
        "float32, float64",
        "the tokenizer has 256 tokens, the decoder only 61",
        "pad_token_id=61",
        "unk_token_id=1",
    ):
        assert reason in message
    assert not (tmp_path / "model").exists()


def test_subclasses_anywhere_are_refused(tmp_path: Path) -> None:
    case = mixtures()

    class OtherBlock(Block):
        """A class of the user's own."""

    class OtherHead(TokenHead):
        """A class of the user's own."""

    case.decoder.blocks[1].__class__ = OtherBlock
    case.decoder.head.__class__ = OtherHead
    case.decoder.blocks[0].feed_forward.shared.experts = OtherExperts(24, 1, 6)
    with pytest.raises(ValueError, match="cannot hold") as raised:
        write_own_class(*case, tmp_path / "model")
    for reason in (
        "head is a OtherHead; it must be one of TokenHead",
        "blocks.1 is a OtherBlock",
        "blocks.0.feed_forward.shared.experts is a OtherExperts; it must be one of GLUExperts",
    ):
        assert reason in str(raised.value)


def test_a_head_that_came_untied(tmp_path: Path) -> None:
    case = gpt()
    case.decoder.head.weight = nn.Parameter(case.decoder.head.weight + 1)
    with pytest.raises(ValueError, match="its head has weights of its own"):
        write_own_class(*case, tmp_path / "model")


def test_export_lists_its_reasons_and_those_of_the_class_together(tmp_path: Path) -> None:
    made = mixtures().decoder
    made.blocks[0].feed_forward.router.__class__ = OtherRouter
    with pytest.raises(ValueError, match="OtherRouter") as raised:
        export_hf(made, tmp_path / "model", to="dsmoe", tokenizer=ByteTokenizer())
    assert "the tokenizer has 256 tokens" in str(raised.value)
    assert not (tmp_path / "model").exists()


def test_a_plan_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="k <= 4"):
        write_own_class(gpt().decoder, SelectionPlan(experts=TopK(5)), tmp_path / "model")


def test_norms_that_differ(tmp_path: Path) -> None:
    case = gpt()
    case.decoder.norm = nn.LayerNorm(24, eps=1e-3)
    with pytest.raises(ValueError, match="its norms differ"):
        write_own_class(*case, tmp_path / "model")


def test_what_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="neither empty nor"):
        write_own_class(*gpt(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@torch.no_grad()
def test_registered(tmp_path: Path, text: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    from lightning_dsmoe.hugging_face.own_class import register_own_class

    case = mixtures()
    write_own_class(*case, tmp_path)
    register_own_class()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model).__module__ == "lightning_dsmoe.hugging_face.own_class.modeling_dsmoe"
    assert_close(model(text).logits, case.decoder(text, case.plan).logits)


ALONE = """
import sys
sys.modules["lightning_dsmoe"] = None  # as if it were not installed
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
text, expected = torch.load(folder + "/expected.pt")
with torch.no_grad():
    logits = model(text).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(61)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
tokenizer.save_pretrained(folder)
model.save_pretrained(folder + "/again")
tokenizer.save_pretrained(folder + "/again")
for each in (folder, folder + "/again"):
    write = pipeline("text-generation", model=each, trust_remote_code=True)
    texts = write(["w5 w7 w9", "w3"], batch_size=2, max_new_tokens=5, do_sample=False)
    assert texts[0][0]["generated_text"].startswith("w5 w7 w9"), texts
assert "lightning_dsmoe" not in {name.split(".")[0] for name in sys.modules if sys.modules[name]}
print("alone")
"""


@pytest.mark.slow
def test_stands_alone(tmp_path: Path, text: Tensor) -> None:
    pytest.importorskip("transformers")
    case = mixtures()
    folder = tmp_path / "model"
    write_own_class(*case, folder)
    with torch.no_grad():
        torch.save((text, case.decoder(text, case.plan).logits), folder / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder)],
        cwd=tmp_path,
        env={
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip().endswith("alone"), done.stderr[-3000:]
    assert (folder / "again" / "modeling_dsmoe.py").exists()
