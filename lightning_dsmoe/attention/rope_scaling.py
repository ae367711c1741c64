"""Scaled rotary frequencies, with which models attend over longer contexts than they began with.

Shapes: P rotating pairs of channels.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class RopeScaling(ABC):
    """Base of changes to rotary frequencies that do not depend on the length of a sequence.

    Scalings are frozen dataclasses of numbers: blocks that have equal ones share their angles.
    """

    @property
    def attention_factor(self) -> float:
        """What multiplies rotated queries and keys."""
        return 1.0

    @abstractmethod
    def frequencies(self, frequencies: Tensor) -> Tensor:
        """The scaled frequencies `[P]`, from theta^(-i / P) of the pairs i, in float32."""


@dataclass(frozen=True)
class LinearRopeScaling(RopeScaling):
    """Rotary frequencies divided by one factor: positions are interpolated (arXiv 2306.15595).

    It is the rope type "linear" of transformers.

    Args:
        factor: by how much longer contexts become, at least 1.

    Raises:
        ValueError: if the factor is out of range.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.attention import LinearRopeScaling
        >>> LinearRopeScaling(4.0).frequencies(torch.tensor([1.0, 0.5]))
        tensor([0.2500, 0.1250])
    """

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def frequencies(self, frequencies: Tensor) -> Tensor:
        """All of them divided by the factor."""
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3RopeScaling(RopeScaling):
    """Low rotary frequencies divided by a factor, high ones kept, as in Llama 3.1.

    A frequency f turns n = L f / (2 pi) times in the original context L. It is divided by the
    factor where n is below low_freq_factor, kept where n is above high_freq_factor, and in between
    moves linearly in n from one to the other. It is the rope type "llama3" of transformers.

    Args:
        factor: divides the low frequencies, at least 1.
        low_freq_factor: turns below which a frequency is low.
        high_freq_factor: turns above which a frequency is high.
        original_max_positions: context L of the model before it was extended.

    Raises:
        ValueError: if a number is out of range.

    Examples:
        >>> import torch
        >>> from lightning_dsmoe.attention import Llama3RopeScaling
        >>> scaling = Llama3RopeScaling(8.0, 1.0, 4.0, original_max_positions=64)
        >>> scaling.frequencies(torch.tensor([1.0, 0.25, 0.01]))
        tensor([1.0000, 0.1440, 0.0012])
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_context(self.original_max_positions)
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                "llama3 rope scaling needs 0 < low_freq_factor < high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )

    def frequencies(self, frequencies: Tensor) -> Tensor:
        """Each divided by the factor, kept, or in between."""
        turns_P = self.original_max_positions * frequencies / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept_P = ((turns_P - self.low_freq_factor) / span).clamp(0, 1)
        return torch.lerp(frequencies / self.factor, frequencies, kept_P)


@dataclass(frozen=True)
class YarnRopeScaling(RopeScaling):
    """Low rotary frequencies divided by a factor, high ones kept, and larger attention scores.

    Like llama3 scaling, but between the two it moves linearly in the number of the pair (YaRN,
    arXiv 2309.00071). It is the rope type "yarn" of transformers.

    Args:
        factor: divides the low frequencies, at least 1.
        original_max_positions: context of the model before it was extended.
        beta_fast: turns in that context from which a frequency is kept.
        beta_slow: turns down to which a frequency is divided.
        attention_scale: what multiplies rotated queries and keys; None for 0.1 ln(factor) + 1.
        truncate: whether the pairs where the two ranges end are rounded, to a wider ramp.

    Raises:
        ValueError: if a number is out of range.

    Examples:
        >>> from lightning_dsmoe.attention import YarnRopeScaling
        >>> round(YarnRopeScaling(4.0, original_max_positions=4096).attention_factor, 4)
        1.1386
    """

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_scale: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_context(self.original_max_positions)
        if not 0 < self.beta_slow < self.beta_fast < math.inf:
            raise ValueError(
                "yarn rope scaling needs 0 < beta_slow < beta_fast, "
                f"got {self.beta_slow} and {self.beta_fast}"
            )
        if self.attention_scale is not None and not 0 < self.attention_scale < math.inf:
            raise ValueError(f"attention_scale must be above 0, got {self.attention_scale}")

    @property
    def attention_factor(self) -> float:
        """What multiplies rotated queries and keys."""
        given = self.attention_scale
        return 0.1 * math.log(self.factor) + 1 if given is None else given

    def frequencies(self, frequencies: Tensor) -> Tensor:
        """Each divided by the factor, kept, or in between."""
        n_pairs = len(frequencies)
        if n_pairs < 2:
            return frequencies  # the first pair is always kept, and shows nothing of theta
        # Pair i turns as often as asked where theta^(-i / P) is that many turns in the context.
        first, last = (self._pair(turns, frequencies) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = first.floor(), last.ceil()
        first, last = first.clamp_min(0), last.clamp_max(2 * n_pairs - 1)
        pairs_P = torch.arange(n_pairs, device=frequencies.device, dtype=frequencies.dtype)
        divided_P = ((pairs_P - first) / (last - first).clamp_min(1e-3)).clamp(0, 1)
        return torch.lerp(frequencies, frequencies / self.factor, divided_P)

    def _pair(self, turns: float, frequencies: Tensor) -> Tensor:
        """The pair, a fraction, that turns so often in the original context."""
        ratio = math.log(self.original_max_positions / (turns * 2 * math.pi))
        return ratio / -frequencies[1].log()


def _check_factor(factor: float) -> None:
    if not 1 <= factor < math.inf:
        raise ValueError(f"rope scaling needs a finite factor of at least 1, got {factor}")


def _check_context(original_max_positions: int) -> None:
    if original_max_positions < 1:
        raise ValueError(f"original_max_positions must be at least 1, got {original_max_positions}")
