"""DS-MoE decoders for transformers.

This file lies beside the weights of exported models and imports torch and transformers only.

Shapes: B sequences, T new positions, S positions so far, N = B T tokens, D width, E experts or
groups of query heads, R of them that run, F hidden units of one expert, H KV heads, C head width.
"""

# What transformers annotates depends on its version.
# mypy: disable-error-code="arg-type,assignment,misc,no-any-return,no-untyped-call"
# mypy: allow-untyped-decorators

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init  # leaves loaded weights alone
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from .configuration_dsmoe import DSMoEConfig

_CACHE = next(
    f.name for f in fields(CausalLMOutputWithPast) if f.name in ("cache", "past_key_values")
)
"""The name of caches in outputs and masks, which depends on the version of transformers."""
_UPDATE_ARGUMENTS = inspect.signature(Cache.update).parameters
_MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters
_FEW_TOKENS = 16
"""Up to so many tokens, each expert that any token chose runs for all of them, under gates that are
zero for the others: reading weights costs more than multiplying them. On one CPU core, with 20M
parameters and 1 or 8 tokens, a step takes 1.01 to 1.07 times as long where the weights of these
experts are gathered for one product, 1.03 to 1.12 where each runs for its own tokens alone."""


def rank(probs: Tensor) -> Tensor:
    """Rank of each expert in its row `[..., E]`, 0 for the largest; lower numbers win ties."""
    return probs.argsort(dim=-1, descending=True, stable=True).argsort(-1)


def above(probs: Tensor, eps: float) -> Tensor:
    """Experts with E S_i > eps, and the most probable one."""
    best = F.one_hot(probs.argmax(-1), probs.shape[-1]).bool()
    return (probs * probs.shape[-1] > eps) | best


def top_p(probs: Tensor, p: float) -> Tensor:
    """The fewest most probable experts whose probabilities reach p."""
    if p == 1:
        return torch.ones_like(probs, dtype=torch.bool)
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    kept = ordered.cumsum(-1) - ordered < p
    kept[..., :1] = True
    return torch.zeros_like(kept).scatter(-1, order, kept)


def chosen(probs: Tensor, selection: dict[str, Any]) -> Tensor:
    """The experts that a selection runs, bool `[..., E]`, from probabilities of the same shape."""
    kind = selection["kind"]
    if kind == "AllExperts":
        return torch.ones_like(probs, dtype=torch.bool)
    if kind == "TopK":
        return rank(probs) < selection["k"]
    if kind == "Threshold":
        return above(probs, selection["eps"])
    if kind == "ThresholdTopK":
        return rank(probs) < above(probs, selection["eps"]).sum(-1).float().mean().round()
    if kind == "TopP":
        return top_p(probs, selection["p"])
    raise ValueError(f"unknown selection {kind!r}")


class LinearRouter(nn.Module):
    """h(x) = W x."""

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class MLPRouter(nn.Module):
    """h(x) = W2 gelu(W1 x + b)."""

    def __init__(self, d_model: int, n_experts: int, d_hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(d_model, d_hidden)
        self.out = nn.Parameter(torch.empty(n_experts, d_hidden))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.hidden.weight.to(x.dtype), self.hidden.bias.to(x.dtype))
        return F.linear(F.gelu(hidden), self.out.to(x.dtype))


class CosineRouter(nn.Module):
    """h(x)_i = exp(s) cos(P x, c_i), with exp(s) at most 100."""

    def __init__(self, d_model: int, n_experts: int, d_hidden: int) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.empty(d_hidden, d_model))
        self.centroids = nn.Parameter(torch.empty(n_experts, d_hidden))
        self.log_scale = nn.Parameter(torch.empty(()))

    def forward(self, x: Tensor) -> Tensor:
        directions = F.normalize(F.linear(x, self.projection.to(x.dtype)), dim=-1)
        centroids = F.normalize(self.centroids.to(x.dtype), dim=-1)
        return self.log_scale.to(x.dtype).exp().clamp(max=100) * F.linear(directions, centroids)


ROUTERS = {"linear": LinearRouter, "mlp": MLPRouter, "cosine": CosineRouter}


class Mixture(nn.Module):
    """A router, and the gates of the experts that its selection runs.

    Where experts were removed, the router still scores them but none of them is chosen.
    """

    def __init__(self, d_model: int, mixture: dict[str, Any]) -> None:
        super().__init__()
        options = dict(mixture["router"])
        kind = ROUTERS[options.pop("kind")]
        self.router = kind(d_model, mixture["n_experts"], **options)
        self.selection = mixture["selection"]
        self.gate_factor = mixture["gate_factor"]
        self.remaining = mixture["remaining"]

    @property
    def runs_all(self) -> bool:
        """Whether every expert runs for every token."""
        return bool(self.selection["kind"] == "AllExperts")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gates `[..., E]` of the experts there are, and bool, those that run; in float32."""
        with _without_autocast(x.device.type):
            logits = self.router(x.to(torch.promote_types(x.dtype, torch.float32)))
            probs = logits.softmax(-1)
            renormalize = self.selection["renormalize"]
            if self.remaining is None:
                active = chosen(probs, self.selection)
            else:
                kept = torch.tensor(self.remaining, device=x.device)
                removed = torch.ones(probs.shape[-1], dtype=torch.bool, device=x.device)
                removed[kept] = False
                active = chosen(probs.masked_fill(removed, -1.0), self.selection)[..., kept]
                probs, logits = probs[..., kept], logits[..., kept]
                if renormalize:  # of the same ratios, where a removed one has all the probability
                    some_left = probs.sum(-1, keepdim=True) > 1e-30
                    probs = torch.where(some_left, probs, logits.softmax(-1))
            gates = probs.masked_fill(~active, 0.0)
            if renormalize:
                gates = gates / gates.sum(-1, keepdim=True)
            return self.gate_factor * gates, active


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    # PyTorch 2.10 breaks the graph where it is asked whether a device has autocast.
    if device_type != "meta" and (
        torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    ):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _running(active_NE: Tensor) -> list[int]:
    """The experts that any token runs."""
    return active_NE.any(0).nonzero().flatten().tolist()


def _skips_experts(module: nn.Module) -> bool:
    """Whether experts that do not run are left out; graphs know no sizes that depend on data."""
    return not (module.training or torch.compiler.is_compiling())


class Experts(nn.Module):
    """Two-layer networks whose outputs are summed under gates, as MLP or as gated linear units."""

    def __init__(
        self, d_model: int, n_experts: int, d_expert: int, options: dict[str, Any]
    ) -> None:
        super().__init__()
        self.is_gated = options["kind"] == "GLU"
        self.activation = options["activation"]
        rows = d_expert * (2 if self.is_gated else 1)
        bias = options["bias"]
        self.w_in = nn.Parameter(torch.empty(n_experts, rows, d_model))
        self.w_out = nn.Parameter(torch.empty(n_experts, d_expert, d_model))
        self.b_in = nn.Parameter(torch.empty(n_experts, rows)) if bias else None
        self.b_out = nn.Parameter(torch.empty(d_model)) if bias else None

    def hidden(self, projected: Tensor) -> Tensor:
        """Hidden units `[..., F]` from their projections."""
        if self.is_gated:
            gate, up = projected.chunk(2, dim=-1)
            return self.activate(gate) * up
        return self.activate(projected)

    def activate(self, x: Tensor) -> Tensor:
        """The activation function by its name in PyTorch."""
        if self.activation == "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        return getattr(F, self.activation)(x)

    def forward(self, x_ND: Tensor, gates_NE: Tensor | None, active_NE: Tensor | None) -> Tensor:
        """Sum of the experts; no gates are gates of 1, and with no `active_NE` all experts run."""
        if active_NE is None:
            y_ND = self.all_experts(x_ND, gates_NE)
        else:
            y_ND = self.some_experts(x_ND, gates_NE, active_NE)
        return y_ND if self.b_out is None else y_ND + self.b_out

    def all_experts(self, x_ND: Tensor, gates_NE: Tensor | None) -> Tensor:
        """Every expert on every token: two wide matrix products."""
        b_in = None if self.b_in is None else self.b_in.flatten()
        projected_NR = F.linear(x_ND, self.w_in.flatten(0, 1), b_in)
        hidden_NEF = self.hidden(projected_NR.unflatten(-1, (len(self.w_in), -1)))
        if gates_NE is not None:
            hidden_NEF = hidden_NEF * gates_NE.to(hidden_NEF.dtype)[..., None]
        return hidden_NEF.flatten(1) @ self.w_out.flatten(0, 1)

    def some_experts(self, x_ND: Tensor, gates_NE: Tensor, active_NE: Tensor) -> Tensor:
        """Each expert on the tokens that chose it; for few tokens on all of them."""
        y_ND = torch.zeros_like(x_ND)
        are_few = len(x_ND) <= _FEW_TOKENS
        for e in _running(active_NE):
            at_M = slice(None) if are_few else active_NE[:, e].nonzero().flatten()
            b_in = None if self.b_in is None else self.b_in[e]
            hidden_MF = self.hidden(F.linear(x_ND[at_M], self.w_in[e], b_in))
            y_MD = (hidden_MF * gates_NE[at_M, e, None].to(hidden_MF.dtype)) @ self.w_out[e]
            y_ND[at_M] += y_MD.to(y_ND.dtype)
        return y_ND


class DSMoEFeedForward(nn.Module):
    """A feed-forward layer: one expert, or a mixture with a router and perhaps a shared expert."""

    def __init__(self, d_model: int, options: dict[str, Any]) -> None:
        super().__init__()
        mixture = options["mixture"]
        self.mixture = None if mixture is None else Mixture(d_model, mixture)
        self.experts = Experts(d_model, options["n_experts"], options["d_expert"], options)
        d_shared = options["d_shared"]
        self.shared = Experts(d_model, 1, d_shared, options) if d_shared else None
        has_gate = options["shared_gate"]
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if has_gate else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        gates_NE = active_NE = None
        if self.mixture is not None:
            gates_NE, active_NE = self.mixture(x_ND)
            if self.mixture.runs_all or not _skips_experts(self):
                active_NE = None
        y_ND = self.experts(x_ND, gates_NE, active_NE)
        if self.shared is not None:
            gate_N1 = None if self.shared_gate is None else self.shared_gate(x_ND).sigmoid()
            y_ND = y_ND + self.shared(x_ND, gate_N1, None)
        return y_ND.view_as(x_BTD)


def rotation(
    positions_BT: Tensor, frequencies: list[float], factor: float
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of each rotating channel, float32 `[B, 1, T, channels]`."""
    steps = torch.tensor(frequencies, dtype=torch.float32, device=positions_BT.device)
    angles = positions_BT[:, None, :, None].float() * steps
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of channels (i, i + half) by its angle, in float32; the rest stays."""
    cos, sin = by
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turning = turning.to(torch.promote_types(x.dtype, torch.float32))
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention and its weights, in plain PyTorch."""
    del kwargs
    key, value = (
        each.repeat_interleave(module.num_key_value_groups, dim=1) for each in (key, value)
    )
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class HeadRMSNorm(nn.RMSNorm):
    """An RMSNorm over each head or over all heads, in the type of its weights and back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class AttentionReader(nn.Module):
    """What attention functions read of a layer, for each number of groups that may run.

    They look for the number on the module, where a forward pass must not write it.
    """

    def __init__(self, config: DSMoEConfig, layer_idx: int, n_groups: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.num_key_value_groups = n_groups


class DSMoEAttention(nn.Module):
    """Grouped-query attention; with a router, each group of query heads is an expert.

    Keys and values do not depend on routing, so that every cache of transformers fits.
    """

    def __init__(self, config: DSMoEConfig, layer_idx: int) -> None:
        super().__init__()
        options = config.blocks[layer_idx]["attention"]
        self.config = config
        self.layer_idx = layer_idx
        self.n_groups, self.n_kv_heads = options["n_groups"], options["n_kv_heads"]
        self.d_head = options["d_head"]
        self.scaling = self.d_head**-0.5
        self.readers = nn.ModuleList(
            AttentionReader(config, layer_idx, n_groups) for n_groups in range(1, self.n_groups + 1)
        )
        self.rotation = options["rotation"]
        mixture, d_model = options["mixture"], config.hidden_size
        self.mixture = None if mixture is None else Mixture(d_model, mixture)
        rows = self.n_kv_heads * self.d_head
        self.w_q = nn.Parameter(torch.empty(self.n_groups, rows, d_model))
        self.w_o = nn.Parameter(torch.empty(self.n_groups, rows, d_model))
        self.kv = nn.Linear(d_model, 2 * rows, bias=options["bias"])
        self.b_q = nn.Parameter(torch.empty(self.n_groups, rows)) if options["bias"] else None
        self.b_o = nn.Parameter(torch.empty(d_model)) if options["output_bias"] else None
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if options["qk_norm"]:
            of_all = options["qk_norm"] == "projection"
            of_keys = (self.n_kv_heads, self.d_head) if of_all else (self.d_head,)
            of_queries = (self.n_groups, *of_keys) if of_all else of_keys
            self.q_norm = HeadRMSNorm(of_queries, eps=options["norm_eps"])
            self.k_norm = HeadRMSNorm(of_keys, eps=options["norm_eps"])

    def forward(
        self,
        x_BTD: Tensor,
        rotations: list[tuple[Tensor, Tensor]],
        attention_mask: Tensor | None,
        cache: Cache | None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        gates_BTE, running = None, None
        if self.mixture is not None:
            gates_BTE, active_BTE = self.mixture(x_BTD)
            few = x_BTD.shape[:2].numel() <= _FEW_TOKENS
            if few and not self.mixture.runs_all and _skips_experts(self):
                running = _running(active_BTE.flatten(0, 1))
                gates_BTE = gates_BTE[..., running]
        q_BTRHC = self.queries(x_BTD, running)
        # The query heads of one KV head adjacent, as attention functions repeat KV heads.
        q_BGTC = q_BTRHC.permute(0, 3, 2, 1, 4).flatten(1, 2)
        k_BTHC, v_BTHC = self.kv(x_BTD).unflatten(-1, (2, self.n_kv_heads, -1)).unbind(2)
        k_BHTC, v_BHTC = self.k_norm(k_BTHC).transpose(1, 2), v_BTHC.transpose(1, 2)
        if self.rotation is not None:
            by = rotations[self.rotation]
            q_BGTC, k_BHTC = rotate(q_BGTC, by), rotate(k_BHTC, by)
        if cache is not None:
            # Static caches of transformers 5.0 do not know where they are.
            place = {"cache_kwargs": {"cache_position": cache_position}}
            given = place if "cache_kwargs" in _UPDATE_ARGUMENTS else {}
            k_BHTC, v_BHTC = cache.update(k_BHTC, v_BHTC, self.layer_idx, **given)
        reader = self.readers[q_BTRHC.shape[2] - 1]
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get(
            self.config._attn_implementation, eager_attention
        )
        heads_BTGC, weights = attend(
            reader, q_BGTC, k_BHTC, v_BHTC, attention_mask, scaling=self.scaling, **kwargs
        )
        heads_BTHRC = heads_BTGC.unflatten(2, (self.n_kv_heads, -1))
        return self.outputs(heads_BTHRC.transpose(2, 3), gates_BTE, running), weights

    def queries(self, x_BTD: Tensor, running: list[int] | None) -> Tensor:
        """Normalised queries of the groups that run, all if None: `[B, T, R, H, C]`."""
        if running is None:
            b_q = None if self.b_q is None else self.b_q.flatten()
            q_BTJ = F.linear(x_BTD, self.w_q.flatten(0, 1), b_q)
        else:
            biases = [None] * self.n_groups if self.b_q is None else list(self.b_q)
            q_BTJ = torch.cat([F.linear(x_BTD, self.w_q[e], biases[e]) for e in running], dim=-1)
        return self.q_norm(q_BTJ.unflatten(-1, (-1, self.n_kv_heads, self.d_head)))

    def outputs(
        self, heads_BTRHC: Tensor, gates_BTR: Tensor | None, running: list[int] | None
    ) -> Tensor:
        """Sum of the groups' outputs under their gates: `[B, T, D]`."""
        heads_BTRJ = heads_BTRHC.flatten(3)
        if gates_BTR is not None:
            heads_BTRJ = heads_BTRJ * gates_BTR.to(heads_BTRJ.dtype)[..., None]
        if running is None:
            y_BTD = heads_BTRJ.flatten(2) @ self.w_o.flatten(0, 1)
        else:
            parts = [heads_BTRJ[:, :, place] @ self.w_o[e] for place, e in enumerate(running)]
            y_BTD = torch.stack(parts).sum(0)
        return y_BTD if self.b_o is None else y_BTD + self.b_o


def _norm(config: DSMoEConfig) -> nn.Module:
    options = dict(config.norm)
    kind = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}[options.pop("kind")]
    return kind(config.hidden_size, **options)


class DSMoEDecoderLayer(GradientCheckpointingLayer):
    """Attention, then a feed-forward layer, each on a normalised residual stream."""

    def __init__(self, config: DSMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = DSMoEAttention(config, layer_idx)
        self.feed_forward_norm = _norm(config)
        self.feed_forward = DSMoEFeedForward(
            config.hidden_size, config.blocks[layer_idx]["feed_forward"]
        )

    def forward(
        self,
        x_BTD: Tensor,
        rotations: list[tuple[Tensor, Tensor]],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attention(
            self.attention_norm(x_BTD), rotations, attention_mask, cache, **kwargs
        )
        x_BTD = x_BTD + attended
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD)), weights


class DSMoEPreTrainedModel(PreTrainedModel):
    """What transformers has to know of DS-MoE decoders."""

    config_class = DSMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DSMoEDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts | DSMoEAttention | LinearRouter | MLPRouter | CosineRouter):
            for name, parameter in module.named_parameters(recurse=False):
                if name.startswith("b_") or name == "log_scale":
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, std=self.config.initializer_range)


class DSMoEModel(DSMoEPreTrainedModel):
    """A DS-MoE decoder without its head."""

    def __init__(self, config: DSMoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            DSMoEDecoderLayer(config, number) for number in range(config.num_hidden_layers)
        )
        self.norm = _norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        cache = past_key_values if cache is None else cache
        use_cache = _first(use_cache, self.config.use_cache)
        checkpointing = self.gradient_checkpointing and self.training
        if use_cache and cache is None and not checkpointing:
            cache = DynamicCache(config=self.config)
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        seen = 0 if cache is None else cache.get_seq_length()
        steps_T = torch.arange(x_BTD.shape[1], device=x_BTD.device) + seen
        positions_BT = _positions(position_ids, attention_mask, steps_T)
        mask = _mask(self.config, x_BTD, attention_mask, cache, steps_T, position_ids)
        if self.embed_positions is not None:
            x_BTD = x_BTD + self.embed_positions(positions_BT)
        rotations = [rotation(positions_BT, **each) for each in self.config.rotations]
        kwargs["cache_position"] = steps_T
        wants_states = _first(output_hidden_states, self.config.output_hidden_states)
        wants_weights = _first(output_attentions, self.config.output_attentions)
        hidden_states, attentions = [x_BTD], []
        for layer in self.layers:
            x_BTD, weights = layer(x_BTD, rotations, mask, cache=cache, **kwargs)
            if wants_states:  # else the memory of each layer is free after it
                hidden_states.append(x_BTD)
            if wants_weights:
                attentions.append(weights)
        x_BTD = hidden_states[-1] = self.norm(x_BTD)
        return BaseModelOutputWithPast(
            last_hidden_state=x_BTD,
            hidden_states=tuple(hidden_states) if wants_states else None,
            attentions=tuple(attentions) if wants_weights else None,
            **{_CACHE: cache if use_cache else None},
        )


def _first(given: bool | None, default: bool) -> bool:
    return default if given is None else given


def _positions(
    position_ids: Tensor | None, attention_mask: Tensor | None, steps_T: Tensor
) -> Tensor:
    """Position of each new token, padding not counted: `[B or 1, T]`."""
    if position_ids is not None:
        return position_ids
    if attention_mask is None or attention_mask.ndim != 2:
        return steps_T[None]
    counted_BS = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    return counted_BS[:, -len(steps_T) :]


def _mask(
    config: DSMoEConfig,
    x_BTD: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    steps_T: Tensor,
    position_ids: Tensor | None,
) -> Any:
    """Who attends to whom, in the form that the attention function takes."""
    names = {
        "inputs_embeds": x_BTD,
        "input_embeds": x_BTD,
        "cache": cache,
        "past_key_values": cache,
        "cache_position": steps_T,
    }
    return create_causal_mask(
        config=config,
        attention_mask=attention_mask,
        position_ids=position_ids,
        **{name: value for name, value in names.items() if name in _MASK_ARGUMENTS},
    )


class DSMoEForCausalLM(DSMoEPreTrainedModel, GenerationMixin):
    """A DS-MoE decoder that runs the experts of its configuration, token by token.

    Call `train()` and every expert is computed for every token, under the gates of the selection.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DSMoEConfig) -> None:
        super().__init__(config)
        self.model = DSMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=past_key_values if cache is None else cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{_CACHE: outputs.get(_CACHE)},
        )
