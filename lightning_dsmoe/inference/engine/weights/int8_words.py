"""8-bit codes that kernels read four at a time, as words.

PyTorch's AVX2 vectors load integers by way of memory: 16,384 x 768 codes took 29 ms against 6.1 of
float32 weights (one thread). Words of four codes are loaded as floats, without the detour, and
taken apart by shifts: 1.8 to 2.2 times the speed of float32 (docs/lab_notes/int8.md).

Shapes: E experts, K active ones, I inputs of a row, Q = I / 4 words of a row, rounded up;
P parts of a weight. Leading dimensions are free.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dsmoe.torch_private import vector_bits

CODES_PER_WORD = 4


def reads_words() -> bool:
    """Whether kernels on this machine read codes as words.

    They do where Inductor compiles for AVX2. With AVX-512 it converts codes well: 1.6 to 2.2 times
    the speed of float32, and float words taken apart by masks were slower (lab_notes/int8.md).
    """
    capability = torch.backends.cpu.get_cpu_capability()
    return capability == "AVX2" or ("AVX512" in capability and vector_bits() == 256)


def words_of(codes: Tensor) -> Tensor:
    """Codes `[..., I]` as words `[..., Q]`: the same memory if four codes divide a row and it.

    Their type is float32, though they hold bits and no numbers: of all types of 32 bits, this is
    the one that is loaded directly.
    """
    missing = -codes.shape[-1] % CODES_PER_WORD
    if missing or codes.storage_offset() % CODES_PER_WORD:
        codes = F.pad(codes, (0, missing)).contiguous()
    return codes.view(torch.float32)


def take_words(words_E: Tensor, experts_K: Tensor | None) -> Tensor:
    """Words of the active experts, `[K, ...]` of `[E, ...]`, as int32; of all experts for None.

    Also all experts are read by their numbers: a kernel would read an input that is nothing but
    seen as another type as that type, by way of memory.
    """
    if experts_K is None:
        experts_K = torch.arange(len(words_E), device=words_E.device)
    words_K: Tensor = words_E[experts_K].view(torch.int32)
    return words_K


def parts_of(weights: Tensor) -> list[Tensor]:
    """The parts that weights come in: themselves, or the four codes of each word, in order.

    Args:
        weights: floating point, int8 codes, or int32 words of codes.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.inference.engine.weights.int8_words import parts_of, words_of
        >>> words = words_of(torch.tensor([1, -2, 3, -4], dtype=torch.int8))
        >>> [code.item() for code in parts_of(words.view(torch.int32))]
        [1, -2, 3, -4]
    """
    if weights.dtype != torch.int32:
        return [weights]
    # Shifted to the left end and back, which extends the sign.
    return [(weights << 24) >> 24, (weights << 16) >> 24, (weights << 8) >> 24, weights >> 24]


def split_inputs(x: Tensor, n_parts: int) -> Tensor:
    """Inputs `[..., I]` as `[..., I / P, P]`: one for each of the P parts of a weight."""
    split: Tensor = F.pad(x, (0, -x.shape[-1] % n_parts)).unflatten(-1, (-1, n_parts))
    return split
