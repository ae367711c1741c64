"""What DDP demands without `find_unused_parameters`: a gradient of each parameter in each step."""

from typing import Any

from lightning import Callback, LightningModule, Trainer


class EveryGradient(Callback):
    """Fails where a backward pass leaves a parameter out."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters: Any = pl_module.named_parameters()
        assert [name for name, parameter in parameters if parameter.grad is None] == []
        print("every parameter has a gradient")
