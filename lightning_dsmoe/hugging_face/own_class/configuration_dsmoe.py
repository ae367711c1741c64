"""Configuration of DS-MoE decoders for transformers.

This file lies beside the weights of exported models and imports nothing but transformers.
"""

# What transformers annotates depends on its version.
# mypy: disable-error-code="call-arg,misc,no-untyped-call"

from typing import Any

from transformers import PretrainedConfig


class DSMoEConfig(PretrainedConfig):
    """Sizes of a DS-MoE decoder, and the experts that run in each of its layers.

    Args:
        vocab_size: tokens of the vocabulary.
        hidden_size: width of the tokens.
        blocks: one entry for each block, `{"attention": {...}, "feed_forward": {...}}`: sizes and
            options of the two layers. Where a layer has a router, its `mixture` holds the router's
            kind, the factor of the gates and the selection of the experts that run.
        norm: `{"kind": "RMSNorm" or "LayerNorm", ...}` and the options of that class of PyTorch.
        rotations: the rotary positions that layers name by their number in this list:
            `{"frequencies": [...], "factor": 1.0}`, one frequency for each pair of channels.
        learned_positions: whether a table of `max_position_embeddings` positions is added to the
            embeddings.
        max_position_embeddings: longest context that the model was made for.
        tie_word_embeddings: whether the head shares the weights of the embeddings.
        initializer_range: standard deviation of initial weights.
        use_cache: whether keys and values are kept while generating.
        **kwargs: the other options of every configuration of transformers.
    """

    model_type = "dsmoe"
    # A list: the Trainer of transformers adds one to it.
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 64,
        blocks: list[dict[str, Any]] | None = None,
        norm: dict[str, Any] | None = None,
        rotations: list[dict[str, Any]] | None = None,
        learned_positions: bool = False,
        max_position_embeddings: int = 2048,
        tie_word_embeddings: bool = True,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.blocks = blocks or []
        self.norm = norm or {"kind": "RMSNorm"}
        self.rotations = rotations or []
        self.learned_positions = learned_positions
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        # What tools of transformers ask for; layers that differ are read from `blocks` alone.
        first = self.blocks[0]["attention"] if self.blocks else {}
        self.num_hidden_layers = len(self.blocks)
        self.num_key_value_heads = first.get("n_kv_heads", 1)
        self.num_attention_heads = self.num_key_value_heads * first.get("n_groups", 1)
        self.head_dim = first.get("d_head", hidden_size)
        for derived in (
            "num_hidden_layers",
            "num_key_value_heads",
            "num_attention_heads",
            "head_dim",
        ):
            kwargs.pop(derived, None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
