"""Which neurons of a dense layer become which expert: three pure functions.

All experts are of one size. A width that they do not divide is filled up with zero neurons, whose
numbers follow those of the layer, and none of the experts has more than one of them.

Shapes: U neurons (units) of the dense layer, E experts, F neurons of one expert, N tokens,
P features of a neuron.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_ROUNDS = 10
_ACTIVE_SHARE = 0.1


def contiguous(n_neurons: int, n_experts: int) -> Tensor:
    """Neurons in their order, a run of them for each expert.

    Args:
        n_neurons: neurons U of the dense layer.
        n_experts: number of experts E.

    Returns:
        Numbers of neurons `[E, F]`; those from U on stand for zero neurons.

    Raises:
        ValueError: if there are fewer neurons than experts, or no experts.

    Examples:
        >>> contiguous(6, 2).tolist()
        [[0, 1, 2], [3, 4, 5]]
        >>> contiguous(5, 2).tolist()  # the last one is a neuron of zeros
        [[0, 1, 2], [3, 4, 5]]
    """
    _check(n_neurons, n_experts)
    return _filled_up(torch.arange(n_neurons).tensor_split(n_experts), n_neurons)


def by_weights(w_in_UP: Tensor, n_experts: int) -> Tensor:
    """Neurons with similar input weights together, by balanced k-means on their directions.

    Args:
        w_in_UP: input weights of each neuron; those of gate and up projection side by side.
        n_experts: number of experts E.

    Returns:
        As `contiguous`.

    Raises:
        ValueError: if there are fewer neurons than experts, or no experts.

    Examples:
        >>> import torch
        >>> by_weights(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.1, 0.9]]), 2).tolist()
        [[0, 2], [1, 3]]
    """
    return _balanced_k_means(w_in_UP, n_experts)


def by_activations(hidden_NU: Tensor, n_experts: int) -> Tensor:
    """Neurons that are active for the same tokens together, by balanced k-means.

    A neuron is active for a token if it is among the 10 % with the largest magnitude there, as in
    CMoE (arXiv 2502.04416), which keeps the most active neurons apart as experts that always run.
    Here all of them are shared out, in equal numbers. Neurons that are active for no token fill the
    experts up, and take no part in forming them.

    Args:
        hidden_NU: activations, best times the length of each neuron's output weights.
        n_experts: number of experts E.

    Returns:
        As `contiguous`.

    Raises:
        ValueError: if there are fewer neurons than experts, or no experts.

    Examples:
        >>> import torch
        >>> hidden = torch.tensor([[3.0, 0.0, 2.0, 0.0], [0.0, 4.0, 0.0, 1.0]]).repeat(1, 5)
        >>> sorted(map(len, by_activations(hidden, 2).tolist()))
        [10, 10]
    """
    n_active = max(1, round(_ACTIVE_SHARE * hidden_NU.shape[1]))
    magnitude_NU = hidden_NU.abs()
    top = magnitude_NU.topk(n_active)
    is_active_NK = (top.values > 0).float()  # of zeros, as ReLU gives many, any would be the top
    active_NU = torch.zeros_like(magnitude_NU, dtype=torch.float32)
    active_NU.scatter_(1, top.indices, is_active_NK)
    return _balanced_k_means(active_NU.mT, n_experts)


def _balanced_k_means(features_UP: Tensor, n_experts: int) -> Tensor:
    n_neurons = len(features_UP)
    _check(n_neurons, n_experts)
    points_UP = F.normalize(features_UP.detach().float())
    # Points of zeros have no direction: as farthest points they would be centers of nothing.
    has_point_U = points_UP.any(1)
    owner_U = torch.full((n_neurons,), -1, device=points_UP.device)
    owner_U[has_point_U] = _k_means(points_UP[has_point_U], _sizes(n_neurons, n_experts))
    rooms = torch.tensor(_sizes(n_neurons, n_experts), device=owner_U.device)
    rooms -= owner_U[has_point_U].bincount(minlength=n_experts)
    owner_U[~has_point_U] = torch.arange(n_experts, device=owner_U.device).repeat_interleave(rooms)
    experts = [(owner_U == e).nonzero()[:, 0].cpu() for e in range(n_experts)]
    return _filled_up(sorted(experts, key=lambda each: int(each[0])), n_neurons)


def _k_means(points_UP: Tensor, sizes: list[int]) -> Tensor:
    """Number of the expert `[U]`, each of at most its size."""
    if not len(points_UP):
        return torch.empty(0, dtype=torch.long, device=points_UP.device)
    # Farthest points first: a start without chance, so that the same layer splits the same way.
    centers = [points_UP.mean(0)]
    nearest_U = points_UP.new_full((len(points_UP),), -torch.inf)
    for _ in sizes:
        nearest_U = torch.maximum(nearest_U, points_UP @ F.normalize(centers[-1], dim=0))
        centers.append(points_UP[nearest_U.argmin()])
    centers_EP = torch.stack(centers[1:])
    owner_U = torch.full((len(points_UP),), -1, device=points_UP.device)
    for _ in range(_ROUNDS):
        before_U, owner_U = owner_U, balanced_assignment(points_UP @ centers_EP.mT, sizes)
        if torch.equal(before_U, owner_U):
            break
        sums_EP = torch.zeros_like(centers_EP).index_add_(0, owner_U, points_UP)
        centers_EP = F.normalize(sums_EP)
    return owner_U


def balanced_assignment(score_UE: Tensor, sizes: list[int] | None = None) -> Tensor:
    """An expert for each neuron, as many neurons for each expert: a stable matching.

    Neurons ask for the expert that they fit best of those that have not refused them, and each
    expert keeps those that would lose most elsewhere (Gale and Shapley 1962). All neurons ask at
    once, so that it takes few rounds of tensor operations instead of a loop over neurons.

    Args:
        score_UE: how well each neuron fits each expert.
        sizes: the most neurons of each expert, U or more in all; None for all U in sizes that
            differ by 1 at most.

    Returns:
        Number of the expert `[U]`.

    Examples:
        >>> import torch
        >>> balanced_assignment(torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [1.0, 0.5]]))
        tensor([0, 0, 1, 1])
    """
    n_neurons, n_experts = score_UE.shape
    sizes = sizes or _sizes(n_neurons, n_experts)
    # What a neuron prefers an expert to the others by, or those far from all would lose all.
    wish_UE = score_UE - score_UE.mean(1, keepdim=True)
    open_UE = torch.ones_like(wish_UE, dtype=torch.bool)
    while True:
        owner_U = wish_UE.masked_fill(~open_UE, -torch.inf).argmax(1)
        wish_U = wish_UE.gather(1, owner_U[:, None])[:, 0]
        counts = owner_U.bincount(minlength=n_experts).tolist()
        refused = False
        for e in range(n_experts):
            if counts[e] > sizes[e]:
                asking = (owner_U == e).nonzero()[:, 0]
                order = wish_U[asking].sort(descending=True, stable=True).indices
                open_UE[asking[order[sizes[e] :]], e] = False
                refused = True
        if not refused:
            return owner_U


def _sizes(n_neurons: int, n_experts: int) -> list[int]:
    size, n_larger = divmod(n_neurons, n_experts)
    return [size + (e < n_larger) for e in range(n_experts)]


def _filled_up(experts: tuple[Tensor, ...] | list[Tensor], n_neurons: int) -> Tensor:
    """Experts of one size, with the numbers of zero neurons where one is missing."""
    size = max(map(len, experts))
    rows, zero = [], n_neurons
    for neurons in experts:
        n_zeros = size - len(neurons)
        rows.append(torch.cat([neurons, torch.arange(zero, zero + n_zeros)]))
        zero += n_zeros
    return torch.stack(rows)


def _check(n_neurons: int, n_experts: int) -> None:
    if not 1 <= n_experts <= n_neurons:
        raise ValueError(
            f"n_experts must be from 1 to the {n_neurons} neurons of a layer, got {n_experts}"
        )
