"""Floating-point operations of a training step.

Shapes: B sequences, H heads, T positions, S all positions, C width of a head.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lightning_dsmoe.torch_private import attention_operators


class StepFlops:
    """Counts what a step does between two hooks of a callback.

    PyTorch's own counter takes two operations for each weight and token of a matrix product and the
    whole square of attention, causal or not. It knows nothing of kernels outside of PyTorch. What
    it finds in a backward pass beyond twice the forward pass are activations computed again, by
    checkpointing or inside attention; they are no work of the model, and left out.
    """

    def __init__(self) -> None:
        self._scope = ExitStack()
        self._counter: FlopCounterMode | None = None
        self._before = self._backward = self._total = 0

    def open(self) -> None:
        """Count from here on, in code that is not compiled."""
        self.close()
        # The counter sees no operations in kernels of a compiled block; and what is compiled for
        # the first time under it would be taken for code that never compiles.
        self._scope.enter_context(torch.compiler.set_stance("force_eager"))
        counter = FlopCounterMode(display=False, custom_mapping=_of_attention())
        self._counter = self._scope.enter_context(counter)
        self._before = self._backward = self._total = 0

    def before_backward(self) -> None:
        """Remember where the forward pass ends."""
        self._before = self._so_far()

    def after_backward(self) -> None:
        """Remember where the backward pass ends; the optimizer's operations do not count."""
        self._total = self._so_far()
        self._backward += self._total - self._before

    def close(self) -> int:
        """Stop counting.

        Returns:
            The operations up to the end of the last backward pass, 0 if there was none.
        """
        self._scope.close()
        self._counter = None
        forward = self._total - self._backward
        return forward + min(self._backward, 2 * forward)

    def _so_far(self) -> int:
        return 0 if self._counter is None else self._counter.get_total_flops()


def _attention(q_BHTC: Any, k_BHSC: Any, v_BHSC: Any, *_: Any, **__: Any) -> int:
    batch_size, n_heads = q_BHTC[:2]
    # PyTorch 2.10's function refuses keys and values of fewer heads, which serve several queries.
    k_BHSC, v_BHSC = ((batch_size, n_heads, *shape[2:]) for shape in (k_BHSC, v_BHSC))
    count: int = sdpa_flop_count(q_BHTC, k_BHSC, v_BHSC)
    return count


def _attention_backward(gradient_BHTC: Any, *shapes: Any, **_: Any) -> int:
    return 2 * _attention(*shapes)


def _of_attention() -> dict[Any, Any]:
    """Counts for all kinds of attention: PyTorch leaves those of CPUs out."""
    both = _attention, _attention_backward
    return {
        operator: count
        for operators in attention_operators()
        for operator, count in zip(operators, both, strict=True)
    }
