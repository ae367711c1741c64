"""Exported directories against the models that transformers makes of them.

Shapes: B sequences, T positions, V vocabulary.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_dsmoe import (
    AllExperts,
    Decoder,
    GLUExperts,
    GroupedQueryAttention,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
    SelectionPlan,
    SwitchPoints,
    TopK,
    compile_sparse,
    export_hf,
    import_hf,
)
from lightning_dsmoe.attention import LinearRopeScaling, Llama3RopeScaling, YarnRopeScaling
from lightning_dsmoe.attention.rope_scaling import RopeScaling
from lightning_dsmoe.hugging_face import plan_of
from lightning_dsmoe.inference import Remaining, generate, prune
from lightning_dsmoe.serialization import shards
from lightning_dsmoe.tokenizers import ByteTokenizer, CharTokenizer

from ..small_models import save_model

transformers = pytest.importorskip("transformers")

VOCABULARY = 67
HEADS: dict[str, Any] = {"n_heads": 6, "n_kv_heads": 2, "d_head": 10}


class Made(NamedTuple):
    """A family, and what of the options makes a model that it can hold."""

    to: str
    attention: Mapping[str, Any] = MappingProxyType({})
    feed_forward: Mapping[str, Any] = MappingProxyType({})
    renormalize: bool = False
    eps: float | None = None
    d_model: int = 48


CASES = {
    "qwen3_moe": Made("qwen3_moe", {"qk_norm": True}),
    "qwen3_moe, renormalized": Made("qwen3_moe", {"qk_norm": True}, renormalize=True),
    "qwen3_moe, biases": Made(
        "qwen3_moe", {"qk_norm": True, "bias": True, "norm_eps": 1e-5}, eps=1e-5
    ),
    "qwen2_moe": Made("qwen2_moe"),
    "qwen2_moe, shared": Made("qwen2_moe", {}, {"d_shared": 5}),
    "qwen2_moe, gated": Made(
        "qwen2_moe", {"bias": True, "output_bias": False}, {"d_shared": 5, "shared_gate": True}
    ),
    "mixtral": Made("mixtral", renormalize=True),
    "mixtral, sum to one": Made("mixtral", {}, {"gate_scale": "sum_to_one"}, renormalize=True),
    "olmoe": Made("olmoe", {"qk_norm": "projection"}, d_model=60),
    "granitemoe": Made("granitemoe", {"bias": True}, renormalize=True),
    "granitemoeshared": Made("granitemoeshared", {}, {"d_shared": 7}, renormalize=True),
    "jetmoe": Made("jetmoe", renormalize=True, eps=1e-6),
    "jetmoe, biases": Made("jetmoe", {"output_bias": True}, renormalize=True, eps=1e-6),
}


def decoder_of(made: Made, n_experts: int, *, tied: bool = False, **options: Any) -> Decoder:
    swiglu = partial(GLUExperts, activation=options.pop("activation", "silu"))
    attention: Any = partial(GroupedQueryAttention, **{**HEADS, **made.attention})
    if made.to == "jetmoe":
        sizes = {"n_experts": n_experts, "n_heads": 2, "d_head": 10}
        attention = partial(MixtureOfAttentionHeads, **sizes, **made.attention)
    decoder = Decoder(
        VOCABULARY,
        made.d_model,
        3,
        attention=attention,
        feed_forward=partial(
            MixtureOfExperts, n_experts=n_experts, d_expert=13, experts=swiglu, **made.feed_forward
        ),
        norm=partial(nn.RMSNorm, eps=made.eps),
        tie_embeddings=tied,
        **options,
    )
    with torch.no_grad():  # nothing that is zero or one by default can hide a mistake
        for name, parameter in decoder.named_parameters():
            scale = 0.5 if "router" in name or "shared_gate" in name else 0.05
            parameter.add_(scale * torch.randn_like(parameter))
    return decoder.eval()


def plan_for(made: Made, k: int | None) -> SelectionPlan:
    selection = AllExperts() if k is None else TopK(k, renormalize=made.renormalize)
    mixed = made.to == "jetmoe"
    return SelectionPlan(experts=selection, attention=selection if mixed else AllExperts())


def load(folder: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def assert_same(decoder: Decoder, plan: SelectionPlan, folder: Path, *, tokens: int = 64) -> None:
    model = load(folder)
    text_BT = torch.randint(VOCABULARY, (2, 33))
    with torch.no_grad():
        ours: Tensor = decoder(text_BT, plan).logits
        theirs: Tensor = model(text_BT).logits
    assert float((ours - theirs).abs().max() / ours.abs().max()) <= 1e-5
    prompt = text_BT[:1, :5]
    greedy = model.generate(prompt, max_new_tokens=tokens, do_sample=False, use_cache=True)
    assert torch.equal(generate(decoder, prompt, tokens, plan=plan, temperature=0), greedy)


@pytest.mark.parametrize("name", ["Qwen2Moe", "Qwen3Moe"])
def test_dense_layers_among_mixtures(name: str, tmp_path: Path) -> None:
    save_model(tmp_path / "source", name, mlp_only_layers=[0, 2], vocab_size=VOCABULARY)
    decoder, plan = import_hf(tmp_path / "source"), plan_of(tmp_path / "source")
    export_hf(decoder, tmp_path / "back", plan=plan)
    before, now = (load_file(tmp_path / at / "model.safetensors") for at in ("source", "back"))
    assert before.keys() == now.keys()
    assert all(torch.equal(tensor, now[key]) for key, tensor in before.items())
    assert_same(decoder, plan, tmp_path / "back")


ALL_RUN = ("qwen3_moe, biases", "qwen2_moe, shared", "mixtral, sum to one", "olmoe", "jetmoe")


@pytest.mark.parametrize(
    ("case", "n_experts", "k"),
    [*((case, 6, 2) for case in CASES), *((case, 8, None) for case in ALL_RUN)],
)
def test_the_same_model(case: str, n_experts: int, k: int | None, tmp_path: Path) -> None:
    made, tied = CASES[case], n_experts == 6
    decoder, plan = decoder_of(made, n_experts, tied=tied), plan_for(CASES[case], k)
    assert export_hf(decoder, tmp_path / "out", to=made.to, plan=plan) == made.to
    assert_same(decoder, plan, tmp_path / "out")
    if k is not None:
        assert export_hf(decoder, tmp_path / "auto", plan=plan) == made.to


PLAN = SelectionPlan(experts=TopK(2, renormalize=True))


def mixtral(n_experts: int = 4, **options: Any) -> Decoder:
    return decoder_of(CASES["mixtral"], n_experts, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir() if each.is_file()}


@pytest.mark.parametrize(
    "scaling",
    [
        LinearRopeScaling(2.0),
        Llama3RopeScaling(8.0, 1.0, 4.0, 16),
        YarnRopeScaling(4.0, 16),
    ],
)
def test_rope_scaling(scaling: RopeScaling, tmp_path: Path) -> None:
    made = Made("mixtral", {"rope_scaling": scaling, "rope_theta": 100.0}, renormalize=True)
    decoder = decoder_of(made, 4)
    export_hf(decoder, tmp_path / "out", plan=PLAN, token_ids={"eos_token_id": 3})
    assert_same(decoder, PLAN, tmp_path / "out", tokens=1)
    assert load(tmp_path / "out").generation_config.eos_token_id == 3


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "leaky_relu", "mish"])
def test_activations(activation: str, tmp_path: Path) -> None:
    decoder = mixtral(activation=activation)
    export_hf(decoder, tmp_path / "out", plan=PLAN)
    assert_same(decoder, PLAN, tmp_path / "out", tokens=1)


def test_a_forced_class_would_be_another_model(tmp_path: Path) -> None:
    """The control: the refusal of raw gates is not for nothing."""
    decoder = mixtral()
    export_hf(decoder, tmp_path / "out", plan=PLAN)
    tokens = torch.randint(VOCABULARY, (2, 33))
    with torch.no_grad():
        raw = decoder(tokens, SelectionPlan(experts=TopK(2))).logits
        theirs = load(tmp_path / "out")(tokens).logits
    assert float((raw - theirs).abs().max() / raw.abs().max()) > 1e-2


def test_removed_experts_are_zeros_again(tmp_path: Path) -> None:
    decoder = prune(mixtral(), Remaining(experts=((0, 2), None, (3,)), attention=(None,) * 3))
    export_hf(decoder, tmp_path / "out", to="mixtral")
    assert_same(decoder, SelectionPlan(), tmp_path / "out", tokens=3)


@pytest.mark.parametrize("case", [name for name in CASES if "sum to one" not in name])
def test_there_and_back(case: str, tmp_path: Path) -> None:
    """With 8 experts the factor of the gates is a power of two, so that it rounds nothing."""
    made = CASES[case]
    if made.to == "jetmoe":
        made = made._replace(attention={"output_bias": True})
    decoder, plan = decoder_of(made, 8), plan_for(made, 2)
    export_hf(decoder, tmp_path / "one", plan=plan)
    imported = import_hf(tmp_path / "one")
    assert plan_of(tmp_path / "one").experts == plan.experts
    export_hf(imported, tmp_path / "two", to=made.to, plan=plan_of(tmp_path / "one"))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("head", [False, True])
def test_8_bits(head: bool, tmp_path: Path) -> None:
    model = compile_sparse(mixtral(tied=True), PLAN, quantization="int8", quantize_head=head)
    assert export_hf(model, tmp_path / "out") == "mixtral"
    tokens = torch.randint(VOCABULARY, (2, 9))
    with torch.no_grad():
        ours, theirs = model.logits(tokens), load(tmp_path / "out")(tokens).logits
    assert float((ours - theirs).abs().max() / ours.abs().max()) <= 1e-5
    assert "8 bits" in (tmp_path / "out" / "README.md").read_text()


def test_a_sparse_model_with_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = CharTokenizer("".join(map(chr, range(48, 48 + VOCABULARY))))
    points = SwitchPoints(gather_up_to=0)
    model = compile_sparse(
        mixtral(), PLAN, switch_points=points, context_length=77, tokenizer=tokenizer
    )
    export_hf(model, tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("Once")["input_ids"] == tokenizer.encode("Once").tolist()
    assert load(tmp_path / "out").config.max_position_embeddings == 77
    generator = transformers.pipeline("text-generation", model=str(tmp_path / "out"))
    text = generator("Once", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert text == model.generate("Once", 8, temperature=0)


def test_half_precision(tmp_path: Path) -> None:
    export_hf(mixtral().to(torch.bfloat16), tmp_path / "out", plan=PLAN)
    assert load(tmp_path / "out").dtype is torch.bfloat16
    assert "near a tie" in (tmp_path / "out" / "README.md").read_text()


def test_the_card(tmp_path: Path) -> None:
    certificate = {"sparse_loss": 1.41, "relative_gap": -0.0005, "relative_gap_95": [-0.001, 0.0]}
    (tmp_path / "f.png").write_bytes(b"picture")
    export_hf(
        mixtral(), tmp_path / "out", plan=PLAN, certificate=certificate, frontier=tmp_path / "f.png"
    )
    card = (tmp_path / "out" / "README.md").read_text()
    front, _, text = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "experts: top 2 renormalized" in text
    assert "0.05 % below" in text
    assert "frontier.png" in text
    assert (tmp_path / "out" / "frontier.png").read_bytes() == b"picture"


def test_all_problems_at_once_and_nothing_written(tmp_path: Path) -> None:
    decoder = mixtral()
    with torch.no_grad():
        decoder.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="whole projection") as raised:
        export_hf(
            decoder,
            tmp_path / "out",
            to="olmoe",
            plan=PLAN,
            tokenizer=ByteTokenizer(),
            token_ids={"eos_token_id": VOCABULARY, "mask_token_id": 0},
        )
    for word in ("not finite: norm.weight", "256 tokens", "eos_token_id must", "got mask_token"):
        assert word in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_what_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    export_hf(mixtral(), folder, plan=PLAN)  # an empty folder
    (folder / "notes.txt").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("of a larger one")
    before = content(folder)
    export_hf(mixtral(6), folder, plan=PLAN)
    assert content(folder)["notes.txt"] == b"mine"
    assert "model-00001-of-00002.safetensors" not in content(folder)
    assert content(folder)["config.json"] != before["config.json"]
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    (folder / "config.json").write_text("{}")
    before = content(folder)
    with pytest.raises(FileExistsError, match="neither empty nor an earlier export"):
        export_hf(mixtral(), folder, plan=PLAN)
    assert content(folder) == before


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    export_hf(mixtral(), tmp_path / "out", plan=PLAN)
    before = content(tmp_path / "out")
    monkeypatch.setattr(f"{shards.__name__}._write_file", failing)
    with pytest.raises(OSError, match="No space left"):
        export_hf(mixtral(6), tmp_path / "out", plan=PLAN)
    assert content(tmp_path / "out") == before
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_other_models(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="got Linear"):
        export_hf(nn.Linear(2, 2), tmp_path / "out")
