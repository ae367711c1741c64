"""The language-model loss of a whole split."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric


class EvaluationLoss(MeanMetric):
    """Mean cross entropy over the tokens of a split that count, of all ranks; a NaN stays one."""

    def __init__(self) -> None:
        super().__init__(nan_strategy=math.nan)

    def begin(self) -> None:
        """Begin a mean in full precision.

        Half-precision training casts metrics too, and a sum of some thousand losses would lose its
        digits. The states are new, since those of a validation are inference tensors, which a later
        run could not change.
        """
        self.set_dtype(torch.promote_types(self.mean_value.dtype, torch.float32))
        self.reset()

    def summary(self, split: str, data: Any) -> dict[str, Tensor]:
        """Loss in nats per token, and what it is per byte and per character.

        Args:
            split: "val" or "test".
            data: the data module; only one that counts bytes, as `TextDataModule`, adds the last
                two.
        """
        loss = self.compute()
        values = {"loss": loss, "perplexity": loss.exp()}
        if hasattr(data, "bytes_per_token"):
            bits = loss / math.log(2)
            values["bits_per_byte"] = bits / data.bytes_per_token(split)
            values["bits_per_char"] = bits / data.chars_per_token(split)
        return values
