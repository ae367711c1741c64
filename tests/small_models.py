"""Small random models of transformers, one of each family that can be read."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"head_dim": 10, "sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 10},
    "GPT2": {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_inner": 24, "n_positions": 128},
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 14,
        "shared_expert_intermediate_size": 10,
    },
    "Qwen3Moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 14,
        "head_dim": 10,
    },
    "Mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 10},
    "GraniteMoe": GRANITE,
    "GraniteMoeShared": {**GRANITE, "shared_intermediate_size": 10},
    "JetMoe": {"num_local_experts": 6, "num_experts_per_tok": 2, "kv_channels": 10},
}
DENSE = ["Llama", "Mistral", "Qwen2", "Qwen3", "GPT2"]
MIXTURES = [name for name in OPTIONS if name not in DENSE]


def save_model(folder: Path, name: str, *, seed: int = 0, **options: Any) -> Any:
    """Save a random model with biases and norms that are not neutral, and return it.

    Args:
        folder: where to.
        name: of the family, as in the names of its classes.
        seed: of the random numbers.
        **options: of the configuration, or of `save_pretrained`.
    """
    saving = {k: options.pop(k) for k in ("save_original_format", "max_shard_size") if k in options}
    sizes = SIZES if name != "GPT2" else {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": None}
    if name == "JetMoe":
        sizes = {k: v for k, v in sizes.items() if k != "num_attention_heads"}
    settings = {**sizes, **OPTIONS[name], **options}
    config = getattr(transformers, f"{name}Config")(**settings)
    config._experts_implementation = "eager"
    kind = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}{kind}")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            # Norms and biases begin neutral: a mistake in their place would not be seen.
            spread = 0.2 if weight.ndim == 1 else 0.5 / weight.shape[-1] ** 0.5
            weight.add_(spread * torch.randn_like(weight))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **saving)
    return model
