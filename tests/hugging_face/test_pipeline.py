"""An exported directory in the pipeline of transformers."""

from functools import partial
from pathlib import Path

from lightning_dsmoe import (
    Decoder,
    GLUExperts,
    GroupedQueryAttention,
    LinearRouter,
    MixtureOfExperts,
    SelectionPlan,
    TopK,
    compile_sparse,
)
from lightning_dsmoe.hugging_face.export_hf import export_hf
from lightning_dsmoe.inference import SwitchPoints
from lightning_dsmoe.tokenizers import HuggingFaceTokenizer
from tests.text_models import byte_tokenizer


def test_text_in_the_pipeline_is_that_of_the_sparse_model(tmp_path: Path) -> None:
    from transformers import pipeline

    experts = partial(
        MixtureOfExperts,
        n_experts=4,
        d_expert=8,
        experts=partial(GLUExperts, activation="silu"),
        router=partial(LinearRouter, init_std=0.5),
    )
    attention = partial(GroupedQueryAttention, n_heads=4, n_kv_heads=2, d_head=4)
    decoder = Decoder(258, 16, 2, attention=attention, feed_forward=experts)
    model = compile_sparse(
        decoder,
        SelectionPlan(experts=TopK(2, renormalize=True)),
        switch_points=SwitchPoints(gather_up_to=0),
        tokenizer=HuggingFaceTokenizer(byte_tokenizer().backend_tokenizer.to_str()),
        context_length=64,
    )
    export_hf(model, tmp_path / "exported")
    generate = pipeline("text-generation", model=str(tmp_path / "exported"), device="cpu")
    generate.model.generation_config.eos_token_id = None
    generate.model.generation_config.max_length = None
    [found] = generate("To be", max_new_tokens=20, do_sample=False)
    # The last character may be incomplete, which a sparse model does not show.
    text = model.generate("To be", 20, temperature=0).rstrip("\N{REPLACEMENT CHARACTER}")
    assert found["generated_text"].rstrip("\N{REPLACEMENT CHARACTER}") == text
