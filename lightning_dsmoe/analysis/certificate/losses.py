"""Two models' predictions of the same text, window by window.

Shapes: B windows in a batch, T positions, N tokens that count, V vocabulary, W windows of a text, G
resamples.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dsmoe.data.windows import IGNORED

RESAMPLES = 2000
_SEED = 1234
_MAX_ELEMENTS = 2**22  # 32 MB in float64


class WindowSums(NamedTuple):
    """Sums over the tokens of each window that count, float64 `[W]`, losses in nats.

    Args:
        dense_loss: cross entropy of the dense model.
        sparse_loss: cross entropy of the sparse model.
        kl: KL(dense || sparse) of the next token's distribution.
        agreed: tokens for which both find the same next token most probable.
        tokens: tokens.
    """

    dense_loss: Tensor
    sparse_loss: Tensor
    kl: Tensor
    agreed: Tensor
    tokens: Tensor


def compare_windows(
    dense_BTV: Tensor, sparse_BTV: Tensor, labels_BT: Tensor, *, max_elements: int = _MAX_ELEMENTS
) -> WindowSums:
    """Compare logits of two models in float64, some tokens at a time.

    Args:
        dense_BTV: logits of the dense model.
        sparse_BTV: logits of the sparse model.
        labels_BT: the next tokens, -100 where none counts.
        max_elements: most logits to hold in float64 at once.
    """
    mask_BT = labels_BT != IGNORED
    sums_5BT = torch.zeros(5, *labels_BT.shape, dtype=torch.float64, device=labels_BT.device)
    sums_5BT[-1] = mask_BT
    if mask_BT.any():
        dense_NV, sparse_NV, labels_N = (x[mask_BT] for x in (dense_BTV, sparse_BTV, labels_BT))
        sums_5BT[:-1, mask_BT] = torch.cat(
            list(_compare(dense_NV, sparse_NV, labels_N, max_elements)), dim=1
        )
    return WindowSums(*sums_5BT.sum(-1))


def gap_interval(
    dense_W: Tensor,
    sparse_W: Tensor,
    *,
    resamples: int = RESAMPLES,
    max_elements: int = _MAX_ELEMENTS,
) -> tuple[float, float] | None:
    """The 95 % bootstrap interval of sum(sparse) / sum(dense) - 1, the relative gap of two losses.

    Windows are drawn with replacement, the same for both models: paired, the interval is that of
    the gap and not of how hard the text is. They are drawn whole, because tokens of one window
    depend on each other; windows are assumed not to. A percentile interval with a fixed seed (Efron
    1979, "Bootstrap Methods: Another Look at the Jackknife").

    Args:
        dense_W: the dense model's loss, summed over each window.
        sparse_W: the same of the sparse model.
        resamples: number of draws of all windows.
        max_elements: most losses to draw at once.

    Returns:
        The 2.5 and the 97.5 percentile; None for fewer than two windows, which have no spread.
    """
    n_windows = len(dense_W)
    if n_windows < 2:
        return None
    losses_2W = torch.stack([dense_W, sparse_W]).double().cpu()
    generator = torch.Generator().manual_seed(_SEED)
    gaps: list[Tensor] = []
    step = max(1, max_elements // n_windows)
    for start in range(0, resamples, step):
        shape = min(step, resamples - start), n_windows
        drawn_GW = torch.randint(n_windows, shape, generator=generator)
        dense_G, sparse_G = losses_2W[:, drawn_GW].sum(-1)
        gaps.append(sparse_G / dense_G - 1)
    percentiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.cat(gaps).quantile(percentiles).tolist()
    return low, high


def _compare(
    dense_NV: Tensor, sparse_NV: Tensor, labels_N: Tensor, max_elements: int
) -> Iterator[Tensor]:
    """Parts of `[4, N]`: both losses, the KL divergence and whether the best tokens agree."""
    step = max(1, max_elements // dense_NV.shape[-1])
    for start in range(0, len(labels_N), step):
        part = slice(start, start + step)
        dense, sparse, labels = dense_NV[part].double(), sparse_NV[part].double(), labels_N[part]
        log_p, log_q = dense.log_softmax(-1), sparse.log_softmax(-1)
        yield torch.stack(
            [
                F.nll_loss(log_p, labels, reduction="none"),
                F.nll_loss(log_q, labels, reduction="none"),
                F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1),
                (dense.argmax(-1) == sparse.argmax(-1)).double(),
            ]
        )
