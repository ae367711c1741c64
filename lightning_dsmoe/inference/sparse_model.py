"""A trained decoder that runs only the experts of a plan.

Shapes: B sequences in a batch, T positions in a sequence, S all positions so far, H KV heads, C
head width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

import torch
from torch import Tensor, nn

from lightning_dsmoe.decoder import Decoder, DecoderOutput
from lightning_dsmoe.inference.artifact.directory import read_artifact, write_artifact
from lightning_dsmoe.inference.artifact.model_card import model_card
from lightning_dsmoe.inference.engine.decode.export import export_step
from lightning_dsmoe.inference.engine.engine import Engine
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.inference.engine.tuning import tune
from lightning_dsmoe.inference.engine.weights.packing import Quantization, quantized_bytes
from lightning_dsmoe.inference.generation import Tokens
from lightning_dsmoe.inference.hub import OnHub
from lightning_dsmoe.inference.text import (
    Prompts,
    Texts,
    continue_prompts,
    continue_texts,
    example_prompt,
)
from lightning_dsmoe.moved import renamed_attributes, renamed_options
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.tokenizers import Tokenizer

DEFAULT_NEW_TOKENS = 200
_Plan = SelectionPlan | None


class WeightReport(NamedTuple):
    """Sizes of a model's weights.

    Args:
        n_bytes: bytes of all weights.
        quantized: bytes of each quantised weight by its name, scales included.
    """

    n_bytes: int
    quantized: dict[str, int]


@renamed_attributes(calibrate="tune", context="context_length")
class SparseModel(OnHub, nn.Module):
    """A decoder for inference under a selection plan; built by `compile_sparse` or `load_sparse`.

    Move it and load weights into it as a whole: compiled steps do not see changes made to its
    `decoder` alone.

    Args:
        decoder: the packed decoder, which this model takes over.
        plan: the experts that run unless a call has a plan of its own.
        architecture: description of the decoder before it was packed, from `describe_decoder`.
        quantization: "int8" if the routed experts are quantised.
        quantize_head: whether the last projection is.
        switch_points: numbers of tokens at which the engine changes its mode of running experts.
        context_length: most tokens that the model attends to; None takes `decoder.max_positions`.
        tokenizer: the tokenizer or its description, kept with the model.

    Raises:
        ValueError: if the plan or the context length does not match the decoder.

    Examples:
        >>> from functools import partial
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from lightning_dsmoe import Decoder, MixtureOfAttentionHeads, MixtureOfExperts
        >>> from lightning_dsmoe import SelectionPlan, TopK, compile_sparse, load_sparse
        >>> from lightning_dsmoe.inference import SwitchPoints
        >>> from lightning_dsmoe.tokenizers import ByteTokenizer
        >>> heads = partial(MixtureOfAttentionHeads, n_experts=4, n_heads=1, d_head=8)
        >>> experts = partial(MixtureOfExperts, n_experts=4, d_expert=8)
        >>> decoder = Decoder(256, 16, 2, attention=heads, feed_forward=experts)
        >>> plan = SelectionPlan(experts=TopK(2), attention=TopK(1))
        >>> uncompiled = SwitchPoints(gather_up_to=0)  # a tiny model needs no compiled step
        >>> model = compile_sparse(
        ...     decoder, plan, switch_points=uncompiled, tokenizer=ByteTokenizer()
        ... )

        Text gives text, all at once or piece by piece:

        >>> text = model.generate("def ", 5, temperature=0)
        >>> "def " + "".join(model.stream("def ", 5, temperature=0)) == text
        True

        Tokens give tokens, under another plan if a call has one:

        >>> tokens = torch.tensor([[72, 105, 32], [72, 111, 32]])
        >>> model.generate(tokens, 5, SelectionPlan(), top_p=0.9).shape
        torch.Size([2, 8])
        >>> model.logits(tokens).shape
        torch.Size([2, 3, 256])
        >>> logits, routings = model(tokens)
        >>> routings.experts[0].probs.shape
        torch.Size([2, 3, 4])

        A directory holds the model, with a card that describes it:

        >>> with TemporaryDirectory() as folder:
        ...     model.save(f"{folder}/model")
        ...     loaded = load_sparse(f"{folder}/model")
        >>> loaded.plan == model.plan
        True
        >>> model.report()
        WeightReport(n_bytes=36160, quantized={})
        >>> model.card({}).splitlines()[11]
        '- 2 layers of width 16, vocabulary of 256, 0.0345 MiB of weights'
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
        decoder.selections(plan)  # raises if it does not fit
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
        """The tokenizer, None for a model of tokens only; its description can be assigned too.

        Raises:
            ValueError: if its description in a file is not that of a tokenizer.
            ImportError: if it needs a package that is not installed.
        """
        # Built at its first use, so that a model of tokens never needs the tokenizer's package.
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
        """Load an artifact directory; it is data only, verified before it takes memory.

        Args:
            path: the directory.
            certified: refuse a certificate that belongs to other files; false ignores it.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file was changed or is invalid.
        """
        decoder, plan, config = read_artifact(Path(path), certified=certified)
        del config["format_version"]
        points = SwitchPoints(**config.pop("switch_points"))
        context_length = config.pop("context")
        return cls(decoder, plan, **config, context_length=context_length, switch_points=points)

    @property
    def switch_points(self) -> SwitchPoints:
        """Numbers of tokens at which the engine changes its mode of running experts, here."""
        return self.engine.switch_points

    @switch_points.setter
    def switch_points(self, points: SwitchPoints) -> None:
        self.engine = Engine(self.decoder, points)

    def tune(self) -> SwitchPoints:
        """Measure which mode of running experts is the fastest for how many tokens, here.

        The model uses the measured switch points from then on, and `save` stores them. Takes one to
        five minutes, most of them for compiling what this machine has not compiled yet.

        Returns:
            The switch points, which hold on machines like this one.

        Examples:
            >>> model = load_sparse("sparse_model")  # doctest: +SKIP
            >>> model.tune()  # doctest: +SKIP
            SwitchPoints(gather_up_to=16, grouped_from=1, measured_on='cpu with AVX512, …')
        """
        self.switch_points = tune(self.decoder, self.plan)
        return self.switch_points

    def warm_up(self, n_sequences: int = 1, plan: SelectionPlan | None = None) -> None:
        """Compile now what decoding so many sequences at once needs, and wait for it.

        Steps are compiled for 1, 2, 4, 8 and 16 sequences: 3 take the one of 4, 9 to 15 that of 8
        and another one. Where a step is not there yet, a larger one takes its place.

        Without it, texts begin uncompiled while another process compiles, and become faster from
        the token on for which the kernels are ready. Both ways compute the same up to rounding, so
        that a sample may take another turn there: warm up to measure time, or to repeat a text.

        Args:
            n_sequences: number of sequences B.
            plan: the experts that run; None takes the model's plan.

        Raises:
            ValueError: if the plan does not match the model, or there is no sequence.
            TypeError: if the plan is no `SelectionPlan`.

        Examples:
            >>> model = load_sparse("sparse_model")  # doctest: +SKIP
            >>> model.warm_up()  # doctest: +SKIP
            >>> model.generate("def ", temperature=0)  # doctest: +SKIP
        """
        if n_sequences < 1:
            raise ValueError(f"n_sequences must be 1 or more, got {n_sequences}")
        self.engine.warm_up(self._plan(plan), n_sequences)

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, plan: SelectionPlan | None = None, *, mask: Tensor | None = None
    ) -> DecoderOutput:
        """Logits of the token after each token, and the routing of every layer.

        Args:
            tokens: `[B, T]`, whole numbers below V.
            plan: the experts that run in this call; None takes the model's plan.
            mask: bool `[B, T]`, false for padding (on the left); None for no padding.

        Returns:
            The logits `[B, T, V]`, and the routings as `Decoder.forward` gives them.

        Raises:
            ValueError: if the plan does not match the model.
            TypeError: if the plan is no `SelectionPlan`.
        """
        return self.engine.forward(tokens, self._plan(plan), mask=mask)

    def logits(
        self, tokens: Tensor, plan: SelectionPlan | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Logits of the token after each token.

        Args:
            tokens: `[B, T]`, whole numbers below V.
            plan: the experts that run in this call; None takes the model's plan.
            mask: bool `[B, T]`, false for padding (on the left); None for no padding.

        Returns:
            The logits `[B, T, V]`.

        Raises:
            ValueError: if the plan does not match the model.
            TypeError: if the plan is no `SelectionPlan`.
        """
        return self.forward(tokens, plan, mask=mask).logits

    @overload
    def generate(
        self, prompts: str, max_new_tokens: int = ..., plan: _Plan = ..., **options: Any
    ) -> str: ...

    @overload
    def generate(
        self, prompts: Texts, max_new_tokens: int = ..., plan: _Plan = ..., **options: Any
    ) -> list[str]: ...

    @overload
    def generate(
        self, prompts: Tokens, max_new_tokens: int = ..., plan: _Plan = ..., **options: Any
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

        Batches of up to `switch_points.gather_up_to` prompts use the compiled decode step, which is
        there for 1, 2, 4, 8 and 16 texts and filled up. At the first use of a model, a kind of plan
        and one of these sizes on a machine another process compiles it, and decoding is slower
        until it is there; `warm_up` waits for it.
        `ThresholdTopK` averages over what runs in one step: up to 16 sequences of the compiled
        step, up to 2,048 tokens of prompts.

        Args:
            prompts: a text, or texts of any lengths; or tokens `[T]` or `[B, T]`.
            max_new_tokens: most tokens to add.
            plan: the experts that run in this call; None takes the model's plan.
            options: those of `lightning_dsmoe.inference.generate`, such as `temperature` (1 unless
                given) and `top_p`. With texts, `stop` is one text or several, and padding, its mask
                and the special tokens with which the tokenizer begins a text are added here.

        Returns:
            Prompts and continuations, in the form of the prompts. A continuation ends with the stop
            text that it met, or before a special token of the tokenizer that ends texts.

        Raises:
            ValueError: if a prompt is empty or longer than the context, an option is out of range,
                the plan does not match the model, or there is a text but no tokenizer.
            TypeError: if there is no such option, or the plan is no `SelectionPlan`.
        """
        options = {"context_length": self.context_length, "plan": self._plan(plan), **options}
        return continue_prompts(
            self.engine, lambda: self.tokenizer, prompts, max_new_tokens, options
        )

    @renamed_options(context="context_length")
    def stream(
        self,
        prompt: str,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        plan: SelectionPlan | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Continue one text, piece by piece as it is generated.

        Args:
            prompt: a text.
            max_new_tokens: most tokens to add.
            plan: the experts that run in this call; None takes the model's plan.
            options: those of `generate`, such as `stop`.

        Returns:
            An iterator over what is added to the prompt: whole characters, up to and with the first
            stop text.

        Raises:
            ValueError: as `generate` does.
            TypeError: as `generate` does, and if the prompt is not one text.
        """
        if not isinstance(prompt, str):
            raise TypeError(
                "stream needs one text; for tokens, generate calls on_tokens with each new one"
            )
        options = {"context_length": self.context_length, "plan": self._plan(plan), **options}
        texts = [prompt]
        return continue_texts(
            "stream", self.engine, self.tokenizer, texts, max_new_tokens, options
        ).pieces()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a pickle; version 0.1 called the context length `context`."""
        renamed = {"context": "context_length"}
        state = {renamed.get(name, name): value for name, value in state.items()}
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.switch_points = self.engine.given_points  # compiled steps hold the weights of before
        return self

    def _plan(self, plan: SelectionPlan | None) -> SelectionPlan:
        if plan is not None:
            self.decoder.selections(plan)  # raises if it does not fit
        return self.plan if plan is None else plan

    def report(self) -> WeightReport:
        """Bytes of the weights, and which of them are quantised."""
        tensors = [*self.decoder.parameters(), *self.decoder.buffers()]
        return WeightReport(sum(t.nbytes for t in tensors), quantized_bytes(self.decoder))

    def save(
        self,
        path: str | Path,
        *,
        certificate: dict[str, Any] | None = None,
        frontier: str | Path | None = None,
    ) -> None:
        """Write an artifact directory atomically; an earlier artifact there is replaced.

        Args:
            path: the directory.
            certificate: measurements of this model; plain data.
            frontier: a picture for the model card, the `frontier.png` of `lightning-dsmoe sweep`.

        Raises:
            FileExistsError: if something else than an artifact is at the path.
            ValueError: if the artifact could not be loaded again, or the certificate belongs to
                another model.
        """
        config = {
            "architecture": self.architecture,
            "quantization": self.quantization,
            "quantize_head": self.quantize_head,
            "context": self.context_length,
            "tokenizer": self.tokenizer_description,
            "switch_points": self.engine.given_points._asdict(),
        }
        write_artifact(
            Path(path),
            self.decoder,
            self.plan,
            config,
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
        machine of this kind and with this version of PyTorch. It takes tokens `[B]`, the keys and
        the values of each layer `[S, B, H, C]`, bool `[S, B]` for the slots that hold a token, and
        the slot `[1]` of the new tokens; it writes to the keys, values and slots and returns logits
        `[B, V]`. It checks nothing: inputs must be contiguous, of these types and in range. The
        file is native code, so load only your own; it takes a minute or two to compile.

        Args:
            path: the file, which is replaced.
            plan: the experts that run in the step; None takes the model's plan.
            n_sequences: number of sequences B.

        Raises:
            CannotCompile: if there is no working compiler, or a layer is not one of this library.

        Examples:
            >>> model = load_sparse("sparse_model")  # doctest: +SKIP
            >>> model.export_step("step.pt2")  # doctest: +SKIP
            >>> step = torch._inductor.aoti_load_package("step.pt2")  # doctest: +SKIP
        """
        layout = self.engine.layout(n_sequences)
        export_step(layout, self._plan(plan), Path(path), n_sequences)


def _forget_compiled(model: SparseModel, keys: object) -> None:
    """Rebuild the engine, whose compiled steps and layouts hold the weights of before."""
    model.switch_points = model.engine.given_points
