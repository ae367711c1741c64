"""Small language models of bytes, with their tokenizers."""

from functools import partial
from typing import Any

from lightning_dsmoe import (
    Decoder,
    GLUExperts,
    LinearRouter,
    MixtureOfAttentionHeads,
    MixtureOfExperts,
    OutputOnly,
    SelectionPlan,
    compile_sparse,
)
from lightning_dsmoe.analysis.text_models import DecoderText, TransformersText
from lightning_dsmoe.inference import SwitchPoints
from lightning_dsmoe.tokenizers import ByteTokenizer

CONTEXT = 24
ROUTER = partial(LinearRouter, init_std=0.5)


def small_decoder() -> DecoderText:
    heads = partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=8, router=ROUTER)
    experts = partial(MixtureOfExperts, n_experts=4, d_expert=8, router=ROUTER)
    decoder = Decoder(256, 16, 2, attention=heads, feed_forward=experts)
    model = compile_sparse(
        decoder,
        SelectionPlan(),
        switch_points=SwitchPoints(gather_up_to=0),
        tokenizer=ByteTokenizer(),
        context_length=CONTEXT,
    )
    return DecoderText(model)


def llama(*, routed: bool = True, beginning: bool = False) -> TransformersText:
    """A Llama over bytes, whose feed-forward layers may be mixtures."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=257,
            eos_token_id=256,
            pad_token_id=256,
            initializer_range=0.2,
        )
    ).eval()
    experts = partial(GLUExperts, activation="silu")
    for layer in model.model.layers if routed else ():
        layer.mlp = OutputOnly(MixtureOfExperts(32, 4, 16, experts=experts, router=ROUTER))
    return TransformersText(model.eval(), byte_tokenizer(beginning=beginning))


def byte_tokenizer(*, beginning: bool = False) -> Any:
    """A tokenizer of transformers with a token for every byte, an end and a beginning."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<begin>"])
    if beginning:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<begin> $A", special_tokens=[("<begin>", 257)]
        )
    marks = {"bos_token": "<begin>"} if beginning else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", **marks
    )
