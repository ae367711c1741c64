"""Whether each expert on its own tokens is estimated to be faster on a GPU.

The costs are derived from published figures for an H100, not measured, and lean towards all
experts on all tokens: that takes about as long as a dense layer, and a wrong estimate is then a
gain that is missed rather than a loss.
"""

# One expert in a product of many does a third of the operations a second of a wide product:
# 180 to 240 TFLOP/s are reported for thin experts, 600 to 700 for wide matrices.
_SLOWER_PER_MAC = 3
# For gathering a token, its output, and adding that up: 8 bytes for each channel at 3.3 TB/s, in
# multiply-accumulates at 330 TMAC/s.
_MACS_PER_CHANNEL = 800
# Starting one takes the host about 5 microseconds, during which a GPU with nothing to do waits.
_MACS_PER_KERNEL = 1_500_000_000
_KERNELS = 30  # that sort pairs, and move tokens and outputs
_KERNELS_PER_EXPERT = 12  # more, where experts run one by one or two by two


def kernels(n_experts: int, *, in_one_product: bool) -> int:
    """Kernels that a layer starts beside those of all experts on all tokens.

    Args:
        n_experts: experts that may run.
        in_one_product: whether one product serves all experts.
    """
    return _KERNELS + (0 if in_one_product else _KERNELS_PER_EXPERT * n_experts)


def grouping_pays(
    n_pairs: int, n_kernels: int, n_tokens: int, n_experts: int, macs: int, d_model: int
) -> bool:
    """Whether each expert on its own tokens is estimated to be faster than all experts on all.

    Args:
        n_pairs: (token, expert) pairs that run.
        n_kernels: kernels that it starts beside those of the other way.
        n_tokens: tokens N.
        n_experts: experts E, removed ones included.
        macs: multiply-accumulates of one expert for one token, about the number of its weights.
        d_model: width D.

    Examples:
        >>> sizes = 32, 2 * 4096 * 512, 4096  # experts of the paper's 6B
        >>> [grouping_pays(4 * n, kernels(32, in_one_product=True), n, *sizes) for n in (512, 1024)]
        [False, True]
    """
    grouped = n_pairs * (_SLOWER_PER_MAC * macs + d_model * _MACS_PER_CHANNEL)
    return grouped + n_kernels * _MACS_PER_KERNEL < n_tokens * n_experts * macs
