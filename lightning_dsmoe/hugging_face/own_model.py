"""Directories of the class of this library, read back as the decoders that they hold."""

from typing import Any, NamedTuple

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.hugging_face.config_file import ConfigFile
from lightning_dsmoe.hugging_face.own_class.describe import own_config
from lightning_dsmoe.hugging_face.own_class.write import own_tensors
from lightning_dsmoe.hugging_face.weight_entries import Entry, same
from lightning_dsmoe.reading import check_json
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.serialization.architecture import build_decoder, describe_decoder

SOURCE = "lightning_dsmoe"
"""A field of `config.json` with the architecture and the plan in our words."""
_FIELDS = {"architecture": dict, "plan": dict}


class OwnModel(NamedTuple):
    """An exported decoder.

    Args:
        decoder: on the meta device.
        plan: the experts that run.
        max_positions: longest context.
        family: its `model_type`.
    """

    decoder: Decoder
    plan: SelectionPlan
    max_positions: int
    family: str = "dsmoe"

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.decoder.vocab_size

    @property
    def n_weights_at_least(self) -> int:
        """Number of its weights."""
        return sum(parameter.numel() for parameter in self.decoder.parameters())


def source_field(decoder: Decoder, plan: SelectionPlan) -> dict[str, Any]:
    """What `read_own_model` reads, for the `config.json`."""
    return {SOURCE: {"architecture": describe_decoder(decoder), "plan": plan.to_dict()}}


def read_own_model(config: ConfigFile) -> OwnModel:
    """Read the configuration of an exported decoder.

    The code of the directory computes what the other fields say, so these have to agree.

    Raises:
        ValueError: if the decoder is not described, or the other fields say something else.
    """
    max_positions = config.size("max_position_embeddings", default=2048)
    config.finish()
    try:
        given = check_json(SOURCE, config.fields.get(SOURCE), _FIELDS)
        decoder = build_decoder(given["architecture"])
        plan = SelectionPlan.from_dict(given["plan"])
        fields, problems = own_config(decoder, plan)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config.name}: {error}") from None
    problems += [
        f"{name} is not that of the decoder described in {SOURCE}"
        for name, value in fields.items()
        if config.fields.get(name) != value
    ]
    if problems:
        raise ValueError(
            f"{config.name}: {'; '.join(problems)}. Export the model again with the plan it has to "
            "run, instead of an edit of this file"
        )
    return OwnModel(decoder, plan, max_positions)


def own_entries(decoder: Decoder) -> list[Entry]:
    """The weight map of the class of this library: other names alone."""
    ours = [
        name
        for name in decoder.state_dict()
        if not (name == "head.weight" and decoder.tie_embeddings)
    ]
    return [same(*names) for names in zip(own_tensors(decoder), ours, strict=True)]
