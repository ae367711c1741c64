"""Weights of all experts of a layer, stored row by row as decoding reads them.

Shapes: E experts, R rows of one expert's weight, I columns (inputs), K active experts, N tokens,
J rows of an unrolled loop, r = R / J, Z = K r, G experts of a group, M tokens of each, P parts of a
row: one, or the four codes of each of its words.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from lightning_dsmoe.inference.engine.weights import int8_words, matvec
from lightning_dsmoe.precision import at_least_float32


class RowMajorWeights(nn.Module):
    """One weight per expert, with contiguous rows that decoding takes dot products with.

    Input weights are stored as they are, output weights transposed: in both cases an expert that
    does not run is one piece of memory that is not read. For more than one token, see
    `TiledWeights`.

    Args:
        weight: `[E, R, I]`.
        transposed: whether the layer's own weight is `[E, I, R]`, as output weights are.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.inference.engine.weights.row_major import RowMajorWeights
        >>> weights = RowMajorWeights(torch.randn(8, 16, 4), transposed=False)
        >>> weights.project(torch.randn(2, 4), torch.tensor([3, 5, 6])).shape
        torch.Size([3, 2, 16])
    """

    weight: Tensor

    def __init__(self, weight: Tensor, *, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.register_buffer("weight", weight.contiguous())

    @property
    def out_dtype(self) -> torch.dtype:
        """Type of the matrices given out."""
        return self.weight.dtype

    def rows(self, experts: int | slice) -> Tensor:
        """Rows `[..., R, I]` of one or more experts in floating point."""
        return self.weight[experts]

    def group(self, experts: Sequence[int]) -> Tensor:
        """Rows `[G, R, I]` of one or two experts, in ascending order: a view, nothing is copied."""
        return self.rows(_evenly_spaced(experts))

    def products(self, x_GMI: Tensor, experts: Sequence[int]) -> Tensor:
        """Products `[G, M, R]` of the rows of one or two experts with M inputs of each.

        Args:
            x_GMI: inputs, of the type of the matrices given out.
            experts: numbers of the experts, ascending.
        """
        return torch.bmm(x_GMI, self.group(experts).mT)

    def forward(self) -> Tensor:
        """The layer's own weights of all experts, `[E, R, I]` or transposed `[E, I, R]`."""
        return self._matrix(slice(None))

    def of(self, experts: Sequence[int]) -> list[Tensor]:
        """The layer's own weights of some experts; no others are read."""
        return [self._matrix(e) for e in experts]

    def _matrix(self, experts: int | slice) -> Tensor:
        rows = self.rows(experts)
        return rows.mT if self.transposed else rows

    def project(self, x_NI: Tensor, experts_K: Tensor | None) -> Tensor:
        """Products of the active experts' weights with an input that they share.

        Args:
            x_NI: an input for each token.
            experts_K: numbers of the active experts; None for all.

        Returns:
            `[K, N, R]` in at least float32.
        """
        return self._row_dot_products(x_NI, experts_K).permute(0, 2, 3, 1).flatten(2)

    def project_and_sum(self, x_KNI: Tensor, experts_K: Tensor | None) -> Tensor:
        """Products of the active experts' weights with an input for each, summed over experts.

        Args:
            x_KNI: an input for each active expert and token.
            experts_K: numbers of the active experts; None for all.

        Returns:
            `[N, R]` in at least float32.
        """
        return self._row_dot_products(x_KNI, experts_K).sum(0).permute(1, 2, 0).flatten(1)

    def _row_dot_products(self, x: Tensor, experts_K: Tensor | None) -> Tensor:
        """Dot products `[K, r, N, J]` of rows with inputs `[N, I]` or `[K, N, I]`."""
        n_rows, n_tokens = self.weight.shape[1], x.shape[-2]
        unroll = matvec.unroll_factor(n_rows, n_tokens)
        rows_JKrI = self._take(unroll, experts_K).unbind(1)
        parts_JPZI = [int8_words.parts_of(rows.flatten(0, 1)) for rows in rows_JKrI]
        x_P = int8_words.split_inputs(at_least_float32(x), len(parts_JPZI[0]))
        x_P = matvec.materialize(x_P.movedim(-1, 0))
        vectors = list(x_P.unbind(-2))
        if x.dim() == 3:  # an input for each expert, repeated for its rows
            repeats = (-1, -1, n_rows // unroll, -1)
            vectors = [x_PKI[:, :, None].expand(repeats).flatten(1, 2) for x_PKI in vectors]
        sums_ZNJ = matvec.row_dot_products([each.unbind() for each in vectors], parts_JPZI)
        return self._rescale(sums_ZNJ.unflatten(0, rows_JKrI[0].shape[:2]), experts_K)

    def _take(self, unroll: int, experts_K: Tensor | None) -> Tensor:
        """Rows `[K, J, r, I]` of the active experts."""
        return take_experts(self.weight.unflatten(1, (unroll, -1)), experts_K)

    def _rescale(self, sums_KrNJ: Tensor, experts_K: Tensor | None) -> Tensor:
        del experts_K
        return sums_KrNJ

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        return f"shape={tuple(self.weight.shape)}, transposed={self.transposed}"


class Int8RowMajorWeights(RowMajorWeights):
    """Row-major weights as int8 codes with one float32 scale a row, W = codes * scales / 127.

    The codes and scales are those of bitsandbytes' vector-wise quantization of the rows; a scale
    is the largest magnitude of its row. Scales multiply the sums, once a row and not once a code.
    Moving the module to another type changes that of the matrices given out; codes and scales stay
    exact, since rounded scales would be an error that nobody measured.

    Args:
        codes: int8 `[E, R, I]`.
        scales: float32 `[E, R]`.
        transposed: whether the layer's own weight is `[E, I, R]`.
        dtype: type of the matrices given out.
    """

    scales: Tensor
    words: Tensor | None

    def __init__(
        self, codes: Tensor, scales: Tensor, *, transposed: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(codes, transposed=transposed)
        self.dtype = dtype
        self.register_buffer("scales", scales)
        self.register_buffer("words", None, persistent=False)

    def in_words(self) -> Self:
        """The same codes and scales, with products that read codes four at a time, as words."""
        weights = type(self)(self.weight, self.scales, transposed=self.transposed, dtype=self.dtype)
        weights.words = int8_words.words_of(self.weight)
        return weights

    def _take(self, unroll: int, experts_K: Tensor | None) -> Tensor:
        words = self._buffers.get("words")  # which pickles of version 0.1 do not have
        if words is None:
            return super()._take(unroll, experts_K)
        return int8_words.take_words(words.unflatten(1, (unroll, -1)), experts_K)

    @property
    def out_dtype(self) -> torch.dtype:
        """Type of the matrices given out."""
        return self.dtype

    def rows(self, experts: int | slice) -> Tensor:
        """Rows `[..., R, I]`, dequantized at each call."""
        exact = torch.promote_types(self.dtype, torch.float32)  # small scales vanish in float16
        scales = (self.scales[experts] / 127).to(exact)
        # In place: new memory takes longer than either pass over it (docs/lab_notes/int8.md).
        return self.weight[experts].to(exact).mul_(scales[..., None]).to(self.dtype)

    def products(self, x_GMI: Tensor, experts: Sequence[int]) -> Tensor:
        """Products `[G, M, R]` of the rows of one or two experts with M inputs of each.

        Where there are fewer sums than codes, scales multiply sums and codes are converted only,
        which takes half of the time of dequantizing them (docs/lab_notes/int8.md). Not in 16 bits:
        sums of codes overflow in float16, and scales would be rounded.

        Args:
            x_GMI: inputs, of the type of the matrices given out.
            experts: numbers of the experts, ascending.
        """
        few = x_GMI.shape[1] < self.weight.shape[2]
        if not few or self.dtype.itemsize < torch.float32.itemsize:
            return super().products(x_GMI, experts)
        group = _evenly_spaced(experts)
        sums_GMR = torch.bmm(x_GMI, self.weight[group].to(self.dtype).mT)
        return sums_GMR.mul_((self.scales[group] / 127)[:, None])

    def _rescale(self, sums_KrNJ: Tensor, experts_K: Tensor | None) -> Tensor:
        scales_KR = take_experts(self.scales, experts_K)
        scales_KJr: Tensor = scales_KR.unflatten(1, (sums_KrNJ.shape[-1], -1))
        return sums_KrNJ * (scales_KJr / 127).mT[:, :, None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `fn` is what `.to()`, `.half()` or `.cuda()` does to every tensor: take its device for the
        # scales but not its type, and ask it for the type of a tensor that has ours.
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scales.device)).dtype
        return self


# Their names in version 0.1, which models pickled whole still have; to go with version 0.3.
Rows, Int8Rows = RowMajorWeights, Int8RowMajorWeights


def as_row_major(weight: nn.Module) -> RowMajorWeights:
    """A weight of a packed decoder, with the type that it has there."""
    assert isinstance(weight, RowMajorWeights)
    return weight


def _evenly_spaced(experts: Sequence[int]) -> slice:
    """One or two numbers, ascending, as a slice."""
    first, *others = experts
    step = others[0] - first if others else 1
    return slice(first, first + step * len(experts), step)


def take_experts(weight_E: Tensor, experts_K: Tensor | None) -> Tensor:
    """What belongs to the active experts, `[K, ...]` of `[E, ...]`; all of it for None.

    None is no index, so that layers whose experts all run read weights in place.
    """
    return weight_E if experts_K is None else weight_E[experts_K]


def quantize_int8(weights: RowMajorWeights) -> Int8RowMajorWeights:
    """Quantize weights row by row with bitsandbytes, on the CPU.

    Raises:
        ImportError: if bitsandbytes is not installed.
    """
    # It warns of a kernel for 4 bits, which are not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes.functional import int8_vectorwise_quant
    except ImportError as error:
        raise ImportError("8-bit weights need bitsandbytes: pip install bitsandbytes") from error
    weight = weights.weight
    codes, scales, _ = int8_vectorwise_quant(weight.flatten(0, 1).cpu().float())
    return Int8RowMajorWeights(
        codes.view(weight.shape).to(weight.device),
        scales.view(weight.shape[:-1]).to(weight.device),
        transposed=weights.transposed,
        dtype=weight.dtype,
    )
