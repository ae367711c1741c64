"""Routed layers with packed weights, in the places of trained ones.

Shapes: B sequences in a batch, T positions, N tokens, D width, E experts; leading dimensions of
tokens that are called x are free.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_dsmoe.attention import KVCache, MixtureOfAttentionHeads
from lightning_dsmoe.attention.attention import attention_scope
from lightning_dsmoe.attention.head_groups import HeadGroups
from lightning_dsmoe.experts import Experts, MixtureOfExperts
from lightning_dsmoe.inference.engine.batched.mixtures import add_attention, add_feed_forward
from lightning_dsmoe.inference.engine.layers.few_tokens import FewTokens, gather_tokens, of_shape
from lightning_dsmoe.inference.engine.weights.packing import Quantizer, pack_weights
from lightning_dsmoe.inference.engine.weights.row_major import as_row_major
from lightning_dsmoe.precision import has_autocast, without_autocast
from lightning_dsmoe.routing import (
    AllExperts,
    MixtureOutput,
    RoutedLayer,
    Selection,
    TopK,
    routed_layers,
)
from lightning_dsmoe.token_shapes import check_width


class PackedMixtureOfExperts(MixtureOfExperts):
    """A `MixtureOfExperts` for inference, with the same call and result; see `pack_layers`."""

    few_tokens: FewTokens

    def forward(self, x: Tensor, selection: Selection = AllExperts()) -> MixtureOutput:
        """Transform tokens `[..., D]`, few of them with the chosen experts' weights alone."""
        check_width(x, self.d_model)
        with _inference(x, self.experts.w_in) as x_own:
            return _of_type(x, self._run(x_own, selection))

    def _run(self, x: Tensor, selection: Selection) -> MixtureOutput:
        n_tokens = x.shape[:-1].numel()
        if isinstance(selection, Selection):  # whatever else it is, `select` says so below
            selection.check(self.n_experts)
        if torch.compiler.is_compiling():
            # One token under `TopK` runs a number of experts that is known when it is traced.
            if type(selection) is TopK and n_tokens == 1:
                return of_shape(x, gather_tokens(self, selection, x.reshape(1, -1)))
        elif (gathered := self.few_tokens(self, selection, x)) is not None:
            return gathered
        y_ND = x.new_zeros(n_tokens, self.d_model)
        grouped = _may_group(self.few_tokens, n_tokens)
        routing = add_feed_forward(y_ND, self, x, selection, grouped=grouped)
        return MixtureOutput(y_ND.view(x.shape), routing)


class PackedMixtureOfAttentionHeads(MixtureOfAttentionHeads):
    """A `MixtureOfAttentionHeads` for inference, with the same call; see `pack_layers`."""

    few_tokens: FewTokens

    def forward(
        self,
        x: Tensor,
        selection: Selection = AllExperts(),
        *,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> MixtureOutput:
        """Self-attention over tokens `[B, T, D]` with the experts that a selection chooses."""
        check_width(x, self.d_model)
        scope = attention_scope(x, mask, cache, causal=self.causal)
        with _inference(x, self.heads.w_q) as x_BTD:
            y_ND = x_BTD.new_zeros(x.shape[:-1].numel(), self.d_model)
            grouped = _may_group(self.few_tokens, len(y_ND))
            seen = scope, mask, cache
            routing = add_attention(y_ND, self, x_BTD, selection, *seen, grouped=grouped)
            return _of_type(x, MixtureOutput(y_ND.view(x.shape), routing))


_PACKED: Mapping[type[nn.Module], type[nn.Module]] = {
    MixtureOfExperts: PackedMixtureOfExperts,
    MixtureOfAttentionHeads: PackedMixtureOfAttentionHeads,
}


def pack_layers(
    model: nn.Module,
    selections: Mapping[str, Selection],
    few_tokens: FewTokens,
    *,
    quantizer: Quantizer | None = None,
) -> None:
    """Pack the routed layers of a model and give them selections that hold by default, in place.

    Layers of other classes than this library's own keep their forward and their weights.

    Args:
        model: any module.
        selections: the experts that run, by the names of `routed_layers`.
        few_tokens: runs layers on a few tokens.
        quantizer: puts the weights of routed experts into 8 bits; None leaves them as they are.
    """
    for name, layer in routed_layers(model).items():
        layer.default_selection = selections[name]
        if not _is_known(layer):
            continue
        if isinstance(layer, MixtureOfExperts):
            pack_weights(layer.experts, quantizer)
            if layer.shared is not None:
                pack_weights(layer.shared.experts)
        else:
            pack_weights(cast(MixtureOfAttentionHeads, layer).heads, quantizer)
        # The very object stays, so that whatever else refers to it, and its hooks, do so still.
        packed = cast(PackedMixtureOfExperts, layer)
        packed.__class__ = cast(Any, _PACKED[type(layer)])
        packed.few_tokens = few_tokens


def packed_layers(
    model: nn.Module,
) -> list[PackedMixtureOfExperts | PackedMixtureOfAttentionHeads]:
    """The layers of a model that `pack_layers` packed."""
    kinds = PackedMixtureOfExperts | PackedMixtureOfAttentionHeads
    return [each for each in routed_layers(model).values() if isinstance(each, kinds)]


def _is_known(layer: RoutedLayer) -> bool:
    """Whether a layer does nothing but what is known here: subclasses may do something else."""
    parts = list(layer.modules())[1:]
    if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        return False  # which packed layers, that call no part as a module, would not run
    if type(layer) is MixtureOfExperts:
        return type(layer.experts).forward is Experts.forward
    return type(layer) is MixtureOfAttentionHeads and type(layer.heads) is HeadGroups


@contextmanager
def _inference(x: Tensor, weight: nn.Module) -> Iterator[Tensor]:
    """Without gradients and autocast; gives the tokens in the type of a weight under autocast.

    Raises:
        RuntimeError: if gradients are wanted.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "a sparse model has no gradients: call it under torch.no_grad(), or train the model "
            "that it was compiled from"
        )
    device = x.device.type
    if has_autocast(device) and torch.is_autocast_enabled(device):
        x = x.to(as_row_major(weight).out_dtype)
    with torch.no_grad(), without_autocast(device):
        yield x


def _of_type(x: Tensor, output: MixtureOutput) -> MixtureOutput:
    """An output in the type of the tokens that were given."""
    return output._replace(output=output.output.to(x.dtype))


def _may_group(few_tokens: FewTokens, n_tokens: int) -> bool:
    """Whether each expert may run on its own tokens: sizes that depend on data are not traced."""
    if torch.compiler.is_compiling():
        return False
    return n_tokens >= max(1, few_tokens.switch_points.grouped_from)
