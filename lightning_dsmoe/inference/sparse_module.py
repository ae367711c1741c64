"""Any model with routed layers, for inference under a plan."""

from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from lightning_dsmoe.inference.artifact.module_artifact import read_module, write_module
from lightning_dsmoe.inference.artifact.module_card import module_card
from lightning_dsmoe.inference.engine.layers.packed_layers import packed_layers
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.inference.engine.weights.packing import Quantization, quantized_bytes
from lightning_dsmoe.inference.hub import OnHub
from lightning_dsmoe.inference.sparse_model import WeightReport
from lightning_dsmoe.routing import SelectionPlan


class SparseModule(OnHub, nn.Module):
    """A model of any class whose routed layers run a plan; built by `compile_sparse`.

    It is called as the model is, and gives what that gives, without gradients. What else the model
    can do is done by `model`, whose routed layers run the plan too. An open `run_plan` holds
    instead of the plan, and so does a selection other than `AllExperts` that the model itself hands
    to a layer. Load weights and move it as one; layers compiled for a few tokens do not see options
    that are changed on their routers later.

    Args:
        model: the model with packed layers, which this one takes over.
        plan: the experts that run.
        quantization: "int8" if routed experts are quantised.
        switch_points: numbers of tokens at which layers change their mode of running experts.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from torch import nn
        >>> from lightning_dsmoe import MixtureOfExperts, OutputOnly, SelectionPlan, TopK
        >>> from lightning_dsmoe import compile_sparse, load_sparse
        >>> def my_model():
        ...     mlp = OutputOnly(MixtureOfExperts(8, n_experts=4, d_expert=16))
        ...     return nn.Sequential(nn.Linear(3, 8), mlp, nn.Linear(8, 2))
        >>> sparse = compile_sparse(my_model(), SelectionPlan(experts=TopK(1)))
        >>> x = torch.randn(20, 3)
        >>> sparse(x).shape
        torch.Size([20, 2])

        A directory holds the weights and the plan, but no code:

        >>> with TemporaryDirectory() as folder:
        ...     sparse.save(f"{folder}/model")
        ...     loaded = load_sparse(f"{folder}/model", model=my_model())
        >>> loaded.plan == sparse.plan, torch.equal(loaded(x), sparse(x))
        (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        plan: SelectionPlan,
        *,
        quantization: Quantization | None = None,
        switch_points: SwitchPoints = SwitchPoints(),
    ) -> None:
        super().__init__()
        self.model = model
        self._plan = plan
        self.quantization = quantization
        self.switch_points = switch_points
        self.eval()

    @property
    def switch_points(self) -> SwitchPoints:
        """Numbers of tokens at which layers change their mode of running experts."""
        return self._switch_points

    @switch_points.setter
    def switch_points(self, points: SwitchPoints) -> None:
        self._switch_points = points
        for layer in packed_layers(self.model):
            layer.few_tokens.switch_points = points

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, also inside a module that is trained."""
        return super().train(False)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, *, certified: bool = True) -> Self:
        """Load an artifact directory; it is data only, verified before it takes memory.

        Args:
            path: the directory.
            model: a model like the one that was compiled, which is not changed.
            certified: refuse a certificate that belongs to other files; false ignores it.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file was changed or is invalid, or the model is another one.
        """
        found, plan, config = read_module(Path(path), model, certified=certified)
        points = SwitchPoints(**config["switch_points"])
        return cls(found, plan, quantization=config["quantization"], switch_points=points)

    def warm_up(self, *args: Any, **kwargs: Any) -> None:
        """Run the model once, compiling at once what its layers need for as many tokens.

        Without it, layers run uncompiled while another process compiles.

        Args:
            args: arguments of the model, as for a call.
            kwargs: named ones.
        """
        sources = {layer.few_tokens for layer in packed_layers(self.model)}
        for few_tokens in sources:
            few_tokens.forget_failures()
            few_tokens.waits = True
        try:
            self(*args, **kwargs)
        finally:
            for few_tokens in sources:
                few_tokens.waits = False

    @property
    def plan(self) -> SelectionPlan:
        """The experts that run; `run_plan` runs others."""
        return self._plan

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives for these arguments."""
        return self.model(*args, **kwargs)

    def report(self) -> WeightReport:
        """Bytes of the weights, and which of them are quantised."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return WeightReport(sum(t.nbytes for t in tensors), quantized_bytes(self.model))

    def save(
        self,
        path: str | Path,
        certificate: dict[str, Any] | None = None,
        *,
        frontier: str | Path | None = None,
    ) -> None:
        """Write an artifact directory atomically; an earlier artifact there is replaced.

        Args:
            path: the directory.
            certificate: measurements of this model; plain data.
            frontier: a picture of loss against active share for the model card.

        Raises:
            FileExistsError: if something else than an artifact is at the path.
            ValueError: if the artifact could not be loaded again, or the certificate belongs to
                another model.
        """
        write_module(
            Path(path),
            self.model,
            self.plan,
            {"quantization": self.quantization, "switch_points": self.switch_points._asdict()},
            card=self.card(certificate or {}, frontier=frontier is not None),
            certificate=certificate,
            frontier=None if frontier is None else Path(frontier),
        )

    def card(self, certificate: dict[str, Any], *, frontier: bool = False) -> str:
        """The model card, in Markdown.

        Args:
            certificate: measurements of this model, empty for none.
            frontier: show the `frontier.png` beside the card.
        """
        return module_card(self.model, self.plan, *self.report(), certificate, frontier=frontier)

    def extra_repr(self) -> str:
        """The plan, for `print`."""
        return f"plan={self.plan}"
