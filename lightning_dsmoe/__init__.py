"""DS-MoE for PyTorch Lightning: train every expert on every token, run the ones that matter."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if Path(__path__[0], "callbacks").is_file():
    # Without symbolic links, which Windows has not by default, git checks a link out as a text
    # file. Its target, like that of `cli_configs`, is beside this package.
    __path__.append(str(Path(__path__[0]).parent))

from lightning_dsmoe import moved
from lightning_dsmoe.imports import imported_on_use
from lightning_dsmoe.version import VERSION

if TYPE_CHECKING:
    from lightning_dsmoe.attention import GroupedQueryAttention as GroupedQueryAttention
    from lightning_dsmoe.attention import LinearRopeScaling as LinearRopeScaling
    from lightning_dsmoe.attention import Llama3RopeScaling as Llama3RopeScaling
    from lightning_dsmoe.attention import MixtureOfAttentionHeads as MixtureOfAttentionHeads
    from lightning_dsmoe.attention import YarnRopeScaling as YarnRopeScaling
    from lightning_dsmoe.data import TextDataModule as TextDataModule
    from lightning_dsmoe.decoder import Decoder as Decoder
    from lightning_dsmoe.experts import FeedForward as FeedForward
    from lightning_dsmoe.experts import GLUExperts as GLUExperts
    from lightning_dsmoe.experts import MixtureOfExperts as MixtureOfExperts
    from lightning_dsmoe.experts import MLPExperts as MLPExperts
    from lightning_dsmoe.hugging_face.export_hf import export_hf as export_hf
    from lightning_dsmoe.hugging_face.import_hf import import_hf as import_hf
    from lightning_dsmoe.inference import SparseModel as SparseModel
    from lightning_dsmoe.inference import SwitchPoints as SwitchPoints
    from lightning_dsmoe.inference import compile_sparse as compile_sparse
    from lightning_dsmoe.inference import load_sparse as load_sparse
    from lightning_dsmoe.losses import RoutingLoss as RoutingLoss
    from lightning_dsmoe.losses import mutual_information_loss as mutual_information_loss
    from lightning_dsmoe.routing import AllExperts as AllExperts
    from lightning_dsmoe.routing import CosineRouter as CosineRouter
    from lightning_dsmoe.routing import LinearRouter as LinearRouter
    from lightning_dsmoe.routing import MLPRouter as MLPRouter
    from lightning_dsmoe.routing import OutputOnly as OutputOnly
    from lightning_dsmoe.routing import RoutedLayer as RoutedLayer
    from lightning_dsmoe.routing import SelectionPlan as SelectionPlan
    from lightning_dsmoe.routing import Threshold as Threshold
    from lightning_dsmoe.routing import ThresholdTopK as ThresholdTopK
    from lightning_dsmoe.routing import TopK as TopK
    from lightning_dsmoe.routing import TopP as TopP
    from lightning_dsmoe.routing import record_routings as record_routings
    from lightning_dsmoe.routing import routed_layers as routed_layers
    from lightning_dsmoe.routing import run_plan as run_plan
    from lightning_dsmoe.training.language_model import DSMoELanguageModel as DSMoELanguageModel
    from lightning_dsmoe.training.upcycled_language_model import (
        UpcycledLanguageModel as UpcycledLanguageModel,
    )
    from lightning_dsmoe.upcycling.upcycle import upcycle as upcycle

__version__ = VERSION

moved.find_moved_modules()

# Imported when first used: the blocks can be had without Lightning, and the command line can answer
# without PyTorch. Both take seconds to load.
_MODULES = {
    "AllExperts": "routing",
    "compile_sparse": "inference",
    "CosineRouter": "routing",
    "Decoder": "decoder",
    "DSMoELanguageModel": "training.language_model",
    "export_hf": "hugging_face",
    "FeedForward": "experts",
    "GLUExperts": "experts",
    "GroupedQueryAttention": "attention",
    "import_hf": "hugging_face",
    "LinearRopeScaling": "attention",
    "LinearRouter": "routing",
    "Llama3RopeScaling": "attention",
    "load_sparse": "inference",
    "MixtureOfAttentionHeads": "attention",
    "MixtureOfExperts": "experts",
    "MLPExperts": "experts",
    "MLPRouter": "routing",
    "mutual_information_loss": "losses",
    "OutputOnly": "routing",
    "record_routings": "routing",
    "routed_layers": "routing",
    "RoutedLayer": "routing",
    "RoutingLoss": "losses",
    "run_plan": "routing",
    "SelectionPlan": "routing",
    "SparseModel": "inference",
    "SwitchPoints": "inference",
    "TextDataModule": "data.text",
    "Threshold": "routing",
    "ThresholdTopK": "routing",
    "TopK": "routing",
    "TopP": "routing",
    "upcycle": "upcycling",
    "UpcycledLanguageModel": "training.upcycled_language_model",
    "YarnRopeScaling": "attention",
}
_SUBMODULES = (
    "analysis",
    "attention",
    "callbacks",
    "data",
    "decoder",
    "experts",
    "hugging_face",
    "inference",
    "losses",
    "metrics",
    "optimizers",
    "routing",
    "schedules",
    "serialization",
    "tokenizers",
    "training",
    "upcycling",
)
_get = imported_on_use(__name__, **_MODULES)

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> object:
    return import_module(f"{__name__}.{name}") if name in _SUBMODULES else _get(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_SUBMODULES})
