"""Whether models of transformers of about 100 M parameters stay what they are, in and out.

    python -m benchmarks.quality.same_logits

Each has random weights in float32, 12 layers and a tail of its family: grouped heads, biases, rope
scaling, a sliding window, tied embeddings. Three models are compared with it, transformers' own
modules being the judge: the same after `upcycle`, what `import_hf` makes of its files, and what
`export_hf` writes of that, read by `from_pretrained`. A gap is the largest difference of logits
over the largest logit of 2 texts of 64 tokens; greedy texts have 64 tokens. A family that one of
our decoders cannot hold is upcycled only.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import machine
from lightning_dsmoe import export_hf, import_hf, upcycle
from lightning_dsmoe.hugging_face import plan_of
from lightning_dsmoe.inference import generate

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_EXPERTS = {"moe_intermediate_size": 384, "num_experts": 8, "num_experts_per_tok": 2}
_FEW = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 384}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama, llama3 rope": ("Llama", {"rope_parameters": _LLAMA3}),
    "Llama, as many KV heads, tied": (
        "Llama",
        {"num_key_value_heads": 12, "tie_word_embeddings": True},
    ),
    "Qwen2": ("Qwen2", {}),
    "Qwen3, tied": ("Qwen3", {"tie_word_embeddings": True}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Mistral, window of 32": ("Mistral", {"sliding_window": 32}),
    "GPT-2": ("GPT2", {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 256}),
    "Gemma-2, window of 32": ("Gemma2", {"sliding_window": 32}),
    "SmolLM3": ("SmolLM3", {}),
    "Qwen3-MoE": ("Qwen3Moe", _EXPERTS),
    "Mixtral": ("Mixtral", _FEW),
    "OLMoE": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 384}),
    "GraniteMoe": ("GraniteMoe", _FEW),
}
_IN_PLACE_ONLY = ("Mistral, window of 32", "Gemma-2, window of 32", "SmolLM3")
_MIXTURES = ("Qwen3-MoE", "Mixtral", "OLMoE", "GraniteMoe")
_NEW_TOKENS = 64


def main() -> None:
    """Compare all models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    print(machine())
    print("\n| model | parameters, M | way | gap of logits | greedy texts equal |")
    print("|---|---|---|---|---|", flush=True)
    rows = [row for name in options.models for row in compared(name)]
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


@torch.no_grad()
def compared(name: str) -> list[dict[str, Any]]:
    """The rows of a model, printed as they come."""
    torch.manual_seed(0)
    model = made(name)
    tokens = torch.randint(2, _SHAPE["vocab_size"], (2, 64))
    logits, text = model(tokens).logits, greedy(model, tokens)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    rows = []

    def add(way: str, found: Tensor, text_found: Tensor) -> None:
        gap = float((found - logits).abs().max() / logits.abs().max())
        equal = torch.equal(text_found, text)
        rows.append({"model": name, "millions": millions, "way": way, "gap": gap, "equal": equal})
        print(f"| {name} | {millions:.0f} | {way} | {gap:.1e} | {equal} |", flush=True)

    if name not in _MIXTURES:
        upcycled = copy.deepcopy(model)
        upcycle(upcycled, 8)
        add("upcycled", upcycled(tokens).logits, greedy(upcycled, tokens))
    if name not in _IN_PLACE_ONLY:
        with tempfile.TemporaryDirectory() as folder:
            theirs, back = Path(folder) / "theirs", Path(folder) / "back"
            model.save_pretrained(theirs)
            decoder = import_hf(theirs, **({} if name in _MIXTURES else {"n_experts": 8})).eval()
            plan = plan_of(theirs) if name in _MIXTURES else None
            continued = generate(decoder, tokens[:, :4], _NEW_TOKENS, plan, temperature=0)
            add("imported", decoder(tokens, plan).logits, continued)
            export_hf(decoder, back, plan=plan)
            again = _read(back)
            add("exported again", again(tokens).logits, greedy(again, tokens))
    return rows


def made(name: str) -> Any:
    """A model with random weights."""
    import transformers

    family, own = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**_SHAPE | own)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    build: Callable[[Any], Any] = getattr(transformers, family + head)
    return build(config).eval()


def greedy(model: Any, tokens: Tensor) -> Tensor:
    """Prompts of four tokens and their greedy continuations."""
    texts: Tensor = model.generate(tokens[:, :4], max_new_tokens=_NEW_TOKENS, do_sample=False)
    return texts


def _read(folder: Path) -> Any:
    import transformers

    # The class of our own comes with the directory, which was written a moment ago.
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


if __name__ == "__main__":
    main()
