"""A trained decoder that runs only the experts of a plan.

Shapes: B batch, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

import torch
from torch import Tensor, nn

from lightning_dsmoe.decoder import Decoder, DecoderOutput
from lightning_dsmoe.inference.artifact.directory import read_artifact, write_artifact
from lightning_dsmoe.inference.artifact.hashes import FRONTIER
from lightning_dsmoe.inference.artifact.model_card import model_card
from lightning_dsmoe.inference.engine.decode.export import export_step
from lightning_dsmoe.inference.engine.engine import Engine
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.inference.engine.tuning import calibrate
from lightning_dsmoe.inference.engine.weights.packing import Quantization, quantized_bytes
from lightning_dsmoe.inference.generation import Tokens
from lightning_dsmoe.inference.prompts import Prompts, continue_prompts, stream_prompt
from lightning_dsmoe.inference.text import example_prompt
from lightning_dsmoe.moved import renamed_options, warn_renamed
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.routing.plan import check_plan
from lightning_dsmoe.tokenizers import Tokenizer

DEFAULT_NEW_TOKENS = 200


class WeightReport(NamedTuple):
    """Bytes of all weights, and of each quantised one by its name, scales included."""

    n_bytes: int
    quantized: dict[str, int]


class SparseModel(nn.Module):
    """A decoder for inference under a selection plan; made by `compile_sparse` or `load_sparse`.

    Move it and load weights into it as a whole: what is compiled does not see changes made to its
    `decoder` alone.

    Args:
        decoder: the packed decoder, which this model takes over.
        plan: the experts that run unless a call says otherwise.
        architecture: what `describe_decoder` said of the decoder before it was packed.
        quantization: "int8" if the routed experts are quantised.
        quantize_head: whether the last projection is.
        switch_points: where one way of running the experts gives way to the next.
        context_length: tokens the model can look back on; None takes `decoder.max_positions`.
        tokenizer: the tokenizer or its description, kept with the model.

    Raises:
        ValueError: if the plan or the context does not fit the decoder.
    """

    _tokenizer: Tokenizer | None
    tokenizer_description: dict[str, Any] | None
    """What files hold of the tokenizer."""

    @renamed_options(context="context_length")
    def __init__(
        self,
        decoder: Decoder,
        plan: SelectionPlan,
        *,
        architecture: dict[str, Any],
        quantization: Quantization | None = None,
        quantize_head: bool = False,
        switch_points: SwitchPoints = SwitchPoints(),
        context_length: int | None = None,
        tokenizer: Tokenizer | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        plan.check(*decoder.plan_sizes)
        longest = decoder.max_positions
        if context_length is None:
            context_length = longest
        elif not 1 <= context_length <= (longest or context_length):
            raise ValueError(
                f"context_length must be from 1 to {longest or 'any length'}, got {context_length}"
            )
        self.decoder = decoder
        self.engine = Engine(decoder, switch_points)
        self.register_load_state_dict_post_hook(_forget_compiled)  # type: ignore[no-untyped-call]
        self.plan = plan
        self.architecture = architecture
        self.quantization = quantization
        self.quantize_head = quantize_head
        self.context_length = context_length
        self.tokenizer = tokenizer

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, None for a model of tokens only; it can be set by its description too.

        Raises:
            ValueError: if its description in a file is not that of a tokenizer.
            ImportError: if it needs a package that is not installed.
        """
        # Made when it is asked for, so that a model of tokens never needs the package.
        if self._tokenizer is None and self.tokenizer_description is not None:
            self._tokenizer = Tokenizer.from_dict(self.tokenizer_description)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | dict[str, Any] | None) -> None:
        if isinstance(tokenizer, Tokenizer):
            self._tokenizer, self.tokenizer_description = tokenizer, dict(tokenizer.to_dict())
        else:
            self._tokenizer, self.tokenizer_description = None, tokenizer

    @classmethod
    def load(cls, path: str | Path, *, certified: bool = True) -> Self:
        """Read an artifact directory.

        Args:
            path: the directory.
            certified: refuse a certificate of other files; off, it is left aside.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file was changed or is not what it should be.
        """
        decoder, plan, config = read_artifact(Path(path), certified=certified)
        options = {name: config[key] for key, name in _CONFIG_OPTIONS.items()}
        options["tokenizer"] = config["tokenizer"]
        return cls(decoder, plan, **options, switch_points=SwitchPoints(**config["switch_points"]))

    @property
    def switch_points(self) -> SwitchPoints:
        """Numbers of tokens at which one way of running experts gives way to the next, here."""
        return self.engine.switch_points

    @switch_points.setter
    def switch_points(self, points: SwitchPoints) -> None:
        self.engine = Engine(self.decoder, points)

    def tune(self) -> SwitchPoints:
        """Measure on this machine where one way of running experts gives way to the next.

        From then on the model runs by that, and `save` keeps it. Takes one to five minutes, most of
        it for compiling what this machine has not compiled yet.
        """
        self.switch_points = calibrate(self.decoder, self.plan)
        return self.switch_points

    def calibrate(self) -> SwitchPoints:
        """Old name of `tune`, until version 0.3."""
        warn_renamed("SparseModel.calibrate", "SparseModel.tune")
        return self.tune()

    @property
    def context(self) -> int | None:
        """Old name of `context_length`, until version 0.3."""
        warn_renamed("SparseModel.context", "SparseModel.context_length")
        return self.context_length

    @context.setter
    def context(self, context_length: int | None) -> None:
        warn_renamed("SparseModel.context", "SparseModel.context_length")
        self.context_length = context_length

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, plan: SelectionPlan | None = None, *, mask: Tensor | None = None
    ) -> DecoderOutput:
        """Logits `[B, T, V]` of the token after each of `[B, T]`, and the routing of every layer.

        Args:
            tokens: whole numbers below V.
            plan: the experts that run in this call; None takes the model's plan.
            mask: bool `[B, T]`, false for padding (on the left); None for no padding.
        """
        return self.engine.forward(tokens, self._plan(plan), mask=mask)

    def logits(
        self, tokens: Tensor, plan: SelectionPlan | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Logits `[B, T, V]` of the token after each of `[B, T]`; see `forward`."""
        return self.forward(tokens, plan, mask=mask).logits

    @overload
    def generate(
        self,
        prompts: str,
        max_new_tokens: int = ...,
        plan: SelectionPlan | None = ...,
        **options: Any,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompts: list[str] | tuple[str, ...],
        max_new_tokens: int = ...,
        plan: SelectionPlan | None = ...,
        **options: Any,
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        prompts: Tokens,
        max_new_tokens: int = ...,
        plan: SelectionPlan | None = ...,
        **options: Any,
    ) -> Tensor: ...

    @renamed_options(context="context_length")
    def generate(
        self,
        prompts: Prompts | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        plan: SelectionPlan | None = None,
        **options: Any,
    ) -> str | list[str] | Tensor:
        """Continue prompts: text gives text, and tokens give tokens.

        Up to `switch_points.gather_up_to` prompts at once use the compiled decode step, which
        takes some seconds to compile when a machine first meets a model, a plan and a number of
        prompts. `ThresholdTopK` counts over what runs at once: up to 16 prompts in the compiled
        step, up to 2,048 tokens of prompts.

        Args:
            prompts: a text, or texts of any lengths; or tokens `[T]` or `[B, T]`.
            max_new_tokens: tokens to add at the most.
            plan: the experts that run; None takes the model's plan.
            options: those of `lightning_dsmoe.inference.generate`. With texts, `stop` is one text
                or several, and padding and its mask are added here.

        Returns:
            Prompts and continuations, in the form of the prompts. A continuation ends with the stop
            text that it met.

        Raises:
            ValueError: if a prompt is empty or longer than the context, an option is out of range,
                or there is a text but no tokenizer.
            TypeError: if there is no such option.
        """
        options = {"context_length": self.context_length, "plan": self._plan(plan), **options}
        return continue_prompts(self.engine, prompts, max_new_tokens, options, self._text_tokenizer)

    @renamed_options(context="context_length")
    def stream(
        self,
        prompt: str,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        plan: SelectionPlan | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """What `generate` adds to a text, in pieces as it comes.

        Args:
            prompt: a text.
            max_new_tokens: tokens to add at the most.
            plan: the experts that run; None takes the model's plan.
            options: those of `generate`, such as `stop`.

        Raises:
            ValueError: as `generate` does.
            TypeError: if there is no such option, or the prompt is not one text.
        """
        options = {"context_length": self.context_length, "plan": self._plan(plan), **options}
        return stream_prompt(self.engine, prompt, max_new_tokens, options, self._text_tokenizer)

    def _text_tokenizer(self) -> Tokenizer:
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ValueError(
                "this model was saved without a tokenizer, so it continues tokens and not text"
            )
        return tokenizer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.switch_points = self.engine.given_points
        return self

    def _plan(self, plan: SelectionPlan | None) -> SelectionPlan:
        if plan is not None:
            check_plan(plan, self.decoder.n_layers)
            plan.check(*self.decoder.plan_sizes)
        return self.plan if plan is None else plan

    def report(self) -> WeightReport:
        """What the weights take, and which of them are quantised."""
        tensors = [*self.decoder.parameters(), *self.decoder.buffers()]
        return WeightReport(sum(t.nbytes for t in tensors), quantized_bytes(self.decoder))

    def save(
        self,
        path: str | Path,
        *,
        certificate: dict[str, Any] | None = None,
        frontier: str | Path | None = None,
    ) -> None:
        """Write an artifact directory, whole or not at all; an earlier artifact is replaced.

        Args:
            path: the directory.
            certificate: what was measured of this model; plain data.
            frontier: a picture for the model card, the `frontier.png` of `lightning-dsmoe sweep`;
                None leaves the one of an earlier artifact.

        Raises:
            FileExistsError: if something else than an artifact is in the way.
            ValueError: if the artifact could not be loaded again, or the certificate is of another
                model.
        """
        config = {key: getattr(self, name) for key, name in _CONFIG_OPTIONS.items()}
        config["tokenizer"] = self.tokenizer_description
        config["switch_points"] = self.engine.given_points._asdict()
        has_frontier = frontier is not None or (Path(path) / FRONTIER).is_file()
        write_artifact(
            Path(path),
            self.decoder,
            self.plan,
            config,
            card=self.card(certificate or {}, frontier=has_frontier),
            certificate=certificate,
            frontier=None if frontier is None else Path(frontier),
        )

    def card(self, certificate: dict[str, Any], *, frontier: bool = False) -> str:
        """The model card, in Markdown.

        Args:
            certificate: what was measured of this model, empty for nothing.
            frontier: show the `frontier.png` that is beside the card.
        """
        prompt = example_prompt(self.tokenizer_description)
        report = self.report()
        return model_card(
            self.decoder, self.plan, *report, certificate, prompt=prompt, frontier=frontier
        )

    def export_step(
        self, path: str | Path, *, plan: SelectionPlan | None = None, n_sequences: int = 1
    ) -> None:
        """Compile one step of decoding with its weights into a `.pt2` file for PyTorch alone.

        `torch._inductor.aoti_load_package(path)` loads it where this library is not installed, on a
        machine of this kind and with this version of PyTorch. It takes tokens `[T]`, the keys and
        the values of each layer `[S, T, H, C]`, bool `[S, T]` for the slots that hold a token, and
        the slot `[1]` of the new ones; it writes to those and gives logits `[T, V]`. It checks
        nothing: all of them must be contiguous and of these types, and in range. The file is native
        code, so load only your own; it takes a minute or two to compile.

        Args:
            path: the file, which is replaced.
            plan: the experts that run; None takes the model's plan.
            n_sequences: number of sequences T.

        Raises:
            CannotCompile: if there is no working compiler, or a layer is not one of this library.
        """
        layout = self.engine.layout(n_sequences)
        export_step(layout, self._plan(plan), Path(path), n_sequences)


_CONFIG_OPTIONS = {
    "architecture": "architecture",
    "quantization": "quantization",
    "quantize_head": "quantize_head",
    "context": "context_length",
}
"""Options by their names in an artifact's configuration."""


def _forget_compiled(model: SparseModel, keys: object) -> None:
    """Make the engine anew, which holds what was made of the weights before."""
    model.switch_points = model.engine.given_points
