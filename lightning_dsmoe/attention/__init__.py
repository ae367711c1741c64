"""Grouped-query attention, the mixture of attention heads, and their KV cache."""

from lightning_dsmoe.attention.attention import Attention as Attention
from lightning_dsmoe.attention.grouped_query import GroupedQueryAttention as GroupedQueryAttention
from lightning_dsmoe.attention.kv_cache import KVCache as KVCache
from lightning_dsmoe.attention.mixture import MixtureOfAttentionHeads as MixtureOfAttentionHeads
from lightning_dsmoe.attention.padding import from_key_padding_mask as from_key_padding_mask
from lightning_dsmoe.attention.rope_scaling import LinearRopeScaling as LinearRopeScaling
from lightning_dsmoe.attention.rope_scaling import Llama3RopeScaling as Llama3RopeScaling
from lightning_dsmoe.attention.rope_scaling import RopeScaling as RopeScaling
from lightning_dsmoe.attention.rope_scaling import YarnRopeScaling as YarnRopeScaling
