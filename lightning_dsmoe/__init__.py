"""DS-MoE: train every expert on every token, then run only the experts that matter."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_dsmoe.moved import find_moved_modules

if TYPE_CHECKING:
    from lightning_dsmoe.attention import MixtureOfAttentionHeads as MixtureOfAttentionHeads
    from lightning_dsmoe.data import TextDataModule as TextDataModule
    from lightning_dsmoe.decoder import Decoder as Decoder
    from lightning_dsmoe.experts import MixtureOfExperts as MixtureOfExperts
    from lightning_dsmoe.inference import compile_sparse as compile_sparse
    from lightning_dsmoe.inference import load_sparse as load_sparse
    from lightning_dsmoe.losses import mutual_information_loss as mutual_information_loss
    from lightning_dsmoe.routing import AllExperts as AllExperts
    from lightning_dsmoe.routing import SelectionPlan as SelectionPlan
    from lightning_dsmoe.routing import Threshold as Threshold
    from lightning_dsmoe.routing import ThresholdTopK as ThresholdTopK
    from lightning_dsmoe.routing import TopK as TopK
    from lightning_dsmoe.routing import TopP as TopP
    from lightning_dsmoe.training.language_model import DSMoELanguageModel as DSMoELanguageModel

__version__ = "0.1.0"

find_moved_modules()

if Path(__path__[0], "callbacks").is_file():
    # Without symbolic links, which Windows has not by default, git checks a link out as a text
    # file. Its target, like that of `cli_configs`, is beside this package.
    __path__.append(str(Path(__path__[0]).parent))

_HOMES = {
    "AllExperts": "routing",
    "Decoder": "decoder",
    "DSMoELanguageModel": "training.language_model",
    "MixtureOfAttentionHeads": "attention",
    "MixtureOfExperts": "experts",
    "SelectionPlan": "routing",
    "TextDataModule": "data",
    "Threshold": "routing",
    "ThresholdTopK": "routing",
    "TopK": "routing",
    "TopP": "routing",
    "compile_sparse": "inference",
    "load_sparse": "inference",
    "mutual_information_loss": "losses",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that blocks never load Lightning."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
