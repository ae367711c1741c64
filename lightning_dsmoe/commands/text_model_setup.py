"""A model of any kind that reads text, for the command that measures it on tasks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning_dsmoe.analysis.text_models import DecoderText, TextModel, TransformersText
from lightning_dsmoe.commands.evaluation_setup import all_experts_model, usable_device
from lightning_dsmoe.inference import SparseModel, load_decoder
from lightning_dsmoe.routing import SelectionPlan, routed_layers
from lightning_dsmoe.routing.plan import PlannedLayer
from lightning_dsmoe.upcycling import load_upcycled
from lightning_dsmoe.upcycling.directory import is_upcycled
from lightning_dsmoe.upcycling.trust import check_no_kernels

ALL_EXPERTS, AS_IT_IS, COMPILED = "all experts", "the model", "its plan"


class Opened(NamedTuple):
    """A model to measure.

    Args:
        model: the model.
        plans: what it runs without any plan being given, by the heading of its column.
        layers: its routed layers, by name.
    """

    model: TextModel
    plans: dict[str, SelectionPlan]
    layers: Mapping[str, PlannedLayer]


def open_text_model(
    *,
    ckpt_path: str | None = None,
    artifact: str | None = None,
    directory: str | None = None,
    prefix_token: int | None = None,
    context: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Opened:
    """Load the one model that is given.

    Args:
        ckpt_path: checkpoint of `fit`.
        artifact: directory of a sparse model.
        directory: directory of a model of transformers, upcycled, exported or any other.
        prefix_token: the token before a text.
        context: most tokens to read at once; None takes the model's context length.
        device: where to run.
        trust_remote_code: let transformers run Python files in the directory.

    Raises:
        ValueError: if not exactly one is given, it is invalid, or the token or the context is none
            of the model.
        ImportError: if the directory needs transformers, which is not installed.
    """
    if sum(each is not None for each in (ckpt_path, artifact, directory)) != 1:
        raise ValueError("evaluate needs exactly one of --ckpt_path, --artifact and --from")
    place = usable_device(device)
    plans = {ALL_EXPERTS: SelectionPlan()}
    options: dict[str, Any] = {"prefix_token": prefix_token}
    if directory is not None:
        module, tokenizer = _of_transformers(directory, trust_remote_code)
        text_model: TextModel = TransformersText(module.to(place), tokenizer, **options)
        layers = routed_layers(module)
        if not layers:
            plans = {AS_IT_IS: SelectionPlan()}
    else:
        if artifact is not None:
            model = SparseModel.load(artifact)
            plans[COMPILED] = model.plan
            # Batches of many sizes would each compile a step of their own.
            model.switch_points = model.engine.given_points._replace(gather_up_to=0)
        else:
            model = all_experts_model(load_decoder(str(ckpt_path)))
        text_model = DecoderText(model.to(place), **options)
        layers = routed_layers(model.decoder)
    if not 0 <= text_model.prefix_token < text_model.vocab_size:
        raise ValueError(
            f"prefix_token must be from 0 to {text_model.vocab_size - 1}, got {prefix_token}"
        )
    if context is not None:
        if not 1 <= context <= text_model.context_length:
            raise ValueError(
                f"context must be from 1 to {text_model.context_length}, got {context}"
            )
        text_model.context_length = context
    return Opened(text_model, plans, layers)


def _of_transformers(directory: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """The model and the tokenizer in a directory, from its files alone."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(
            "a model of transformers needs: pip install 'lightning-dsmoe[hf]'"
        ) from error
    if not (Path(directory) / "config.json").is_file():
        raise ValueError(f"{directory} is no directory of a model: it has no config.json")
    if not trust_remote_code:
        check_no_kernels(Path(directory))
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        if is_upcycled(Path(directory)):
            model = load_upcycled(directory, trust_remote_code=trust_remote_code)
        else:
            # Only safetensors: a pickle can hold code.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory, use_safetensors=True, output_loading_info=True, **options
            )
            model, found = loaded
            if missing := sorted(found["missing_keys"]):  # they would be random numbers
                raise ValueError(f"{len(missing)} weights are in no file, such as {missing[0]}")
        return model, AutoTokenizer.from_pretrained(directory, **options)
    except ImportError:
        raise
    except Exception as error:  # of any kind, for files that are no model
        raise ValueError(f"transformers cannot load {directory}: {error}") from None
