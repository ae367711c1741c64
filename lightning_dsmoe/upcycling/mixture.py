"""A dense network as a mixture of experts of the same total width.

Shapes: U neurons, D width, E experts, F neurons of one expert, N tokens.
"""

from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from lightning_dsmoe.experts import MixtureOfExperts
from lightning_dsmoe.routing import LinearRouter
from lightning_dsmoe.upcycling.dense_mlp import DenseMLP

_LOGIT_STD = 0.05
"""Of a router from activations: gates near 1 leave the output of all experts nearly as it was."""
_RIDGE = 1e-2


def mixture_of(
    mlp: DenseMLP, neurons_EF: Tensor, router_ED: Tensor | None = None
) -> MixtureOfExperts:
    """The mixture whose experts share out the neurons of a dense network.

    With a router of zeros all gates are 1, and all experts together are that network.

    Args:
        mlp: the network.
        neurons_EF: the neurons of each expert; numbers from U on are neurons of zeros.
        router_ED: weights of the router; None for zeros.

    Returns:
        The mixture, with weights of the same types, device and `requires_grad`.
    """
    n_experts, d_expert = neurons_EF.shape
    width = mlp.w_out.shape[1]
    has_bias = mlp.b_in is not None or mlp.b_out is not None
    experts = partial(mlp.experts_class, activation=mlp.activation, bias=has_bias)
    with torch.device("meta"):
        mixture = MixtureOfExperts(
            width, n_experts, d_expert, router=partial(LinearRouter, init_std=0.0), experts=experts
        )
    w_in = torch.cat([_taken(w, neurons_EF) for w in mlp.w_in], dim=1)
    trained = mlp.w_in[0].requires_grad
    mixture.experts.w_in.weight = nn.Parameter(w_in, requires_grad=trained)
    w_out = nn.Parameter(_taken(mlp.w_out, neurons_EF), requires_grad=mlp.w_out.requires_grad)
    mixture.experts.w_out.weight = w_out
    if has_bias:
        b_in = mlp.b_in or tuple(w.new_zeros(len(w)) for w in mlp.w_in)
        b_in_ER = torch.cat([_taken(b, neurons_EF) for b in b_in], dim=1)
        b_out = w_out.new_zeros(width) if mlp.b_out is None else mlp.b_out.detach().clone()
        mixture.experts.b_in = nn.Parameter(b_in_ER, requires_grad=trained)
        mixture.experts.b_out = nn.Parameter(b_out, requires_grad=w_out.requires_grad)
    router = w_out.new_zeros(n_experts, width) if router_ED is None else router_ED
    mixture.router.weight = nn.Parameter(router.to(w_out))
    return mixture


@torch.no_grad()
def router_from_activations(mlp: DenseMLP, neurons_EF: Tensor, x_ND: Tensor) -> Tensor:
    """Weights `[E, D]` of a linear router that prefers the experts that contribute most.

    Least squares (with a small ridge) of the length of each expert's output, over the mean of all
    experts at that token, on the tokens. The logits are scaled to a standard deviation of 0.05, so
    that the gates of all experts stay near 1 while their order is that of the fit.

    Args:
        mlp: the network.
        neurons_EF: the neurons of each expert.
        x_ND: tokens as they come into the network.
    """
    x_ND = x_ND.float()
    hidden_NU = mlp.hidden(x_ND)
    lengths = []
    for neurons_F in neurons_EF:
        some = neurons_F[neurons_F < len(mlp.w_out)].to(hidden_NU.device)
        lengths.append((hidden_NU[:, some] @ mlp.w_out[some].float()).norm(dim=1))
    length_NE = torch.stack(lengths, 1)
    mean_N1 = length_NE.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    target_NE = length_NE / mean_N1 - 1
    gram_DD = x_ND.mT @ x_ND
    gram_DD.diagonal().add_(_RIDGE * gram_DD.diagonal().mean())
    weight_ED = torch.linalg.solve(gram_DD, x_ND.mT @ target_NE).mT
    std = (x_ND @ weight_ED.mT).std()
    scaled_ED: Tensor = weight_ED * (_LOGIT_STD / std if std > 0 else 0)
    return scaled_ED


def _taken(values: Tensor, neurons_EF: Tensor) -> Tensor:
    """The rows of some neurons, `[E, F, ...]`, zeros for those beyond the last."""
    neurons_EF = neurons_EF.to(values.device)
    last = len(values) - 1
    taken = values.detach()[rearrange(neurons_EF.clamp(max=last), "e f -> (e f)")]
    if neurons_EF.max() > last:
        taken[rearrange(neurons_EF > last, "e f -> (e f)")] = 0
    stacked: Tensor = taken.unflatten(0, neurons_EF.shape)
    return stacked
