"""Modules and options that had other names in version 0.1; the old names go with version 0.3."""

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial, wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

Options = ParamSpec("Options")
Result = TypeVar("Result")
Owner = TypeVar("Owner")

_PACKAGE = "lightning_dsmoe."
MOVED = {
    "losses.entropy": "losses.mutual_information",
    "losses.masking": "losses.token_sums",
    "losses.ranks": "losses.token_sums",
    "routing.gate_scale": "routing.routing",
    "experts.layer": "experts.feed_forward",
    "inference.architecture": "serialization.architecture",
    "inference.class_paths": "serialization.class_paths",
    "inference.checkpoint": "serialization.checkpoint",
    "inference.archive": "serialization.archive",
    "inference.pruning": "serialization.pruning",
    "language_model": "training.language_model",
    "checkpointed_model": "training.checkpoints",
    "objective": "training.objective",
    "routing_losses": "training.routing_losses",
    "parameter_groups": "training.parameter_groups",
    "random_state": "training.random_state",
    "optimization": "training.optimization",
    "optimizer_settings": "training.optimizer_settings",
    "strategies": "training.strategies",
    "checkpoint_io": "training.checkpoint_io",
    "restored_paths": "training.restored_paths",
    "last_checkpoint": "training.last_checkpoint",
    "inference.artifact_config": "inference.artifact.config",
    "inference.artifact_certificate": "inference.artifact.certificate",
    "inference.artifact_hashes": "inference.artifact.hashes",
    "inference.model_card": "inference.artifact.model_card",
    "inference.context": "inference.generation",
    "inference.option_names": "inference.prompts",
    "inference.engine.calibration": "inference.engine.tuning",
    "inference.engine.rows": "inference.engine.weights.row_major",
    "inference.engine.tiles": "inference.engine.weights.tiled",
    "inference.engine.packing": "inference.engine.weights.packing",
    "inference.engine.head": "inference.engine.weights.int8_head",
    "inference.engine.spelling": "inference.engine.weights.matvec",
    "inference.engine.step": "inference.engine.decode.step",
    "inference.engine.choice": "inference.engine.decode.expert_choice",
    "inference.engine.gather": "inference.engine.decode.gathered_layers",
    "inference.engine.compiled": "inference.engine.decode.compiled_step",
    "inference.engine.kernels": "inference.engine.decode.aot_cache",
    "inference.engine.portable": "inference.engine.decode.export",
    "inference.engine.many": "inference.engine.batched.forward",
    "inference.engine.wide": "inference.engine.batched.masked_layers",
    "inference.engine.grouped": "inference.engine.batched.grouped_layers",
    "analysis.certificate_judgement": "analysis.certificate.judgement",
    "analysis.certificate_losses": "analysis.certificate.losses",
    "analysis.certificate_mixtures": "analysis.certificate.mixtures",
    "analysis.certificate_reading": "analysis.certificate.reading",
    "analysis.certificate_check": "analysis.certificate.check",
    "analysis.plan_search": "analysis.plans.search",
    "analysis.solvers": "analysis.plans.solvers",
    "analysis.uniform": "analysis.plans.solvers",
    "analysis.divergence": "analysis.plans.divergence",
    "analysis.routing_statistics": "analysis.plans.routing_statistics",
    "analysis.frontier": "analysis.plans.frontier",
    "analysis.frontier_figure": "analysis.plans.frontier",
    "analysis.sweep": "analysis.plans.frontier",
    "analysis.report_page": "analysis.report",
    "analysis.pruning": "analysis.unused_experts",
    "analysis.utilization": "analysis.report.utilization",
    "analysis.drift": "analysis.report.drift",
    "analysis.sample_routing": "analysis.report.sample_routing",
    "analysis.token_preferences": "analysis.report.lift",
    "analysis.expert_pairs": "analysis.report.lift",
    "routing.remaining": "routing.removed",
    "attention.some_queries": "attention.sparse_attention",
    "commands.trained": "commands.evaluation_setup",
    "callbacks.mass_steering": "callbacks.gate_mass_controller",
    "data.tokenizers": "tokenizers",
}


def current_name(module: str) -> str:
    """The name of a module today, which was perhaps moved."""
    new = MOVED.get(module.removeprefix(_PACKAGE)) if module.startswith(_PACKAGE) else None
    return module if new is None else _PACKAGE + new


class _Moved(MetaPathFinder, Loader):
    """Finds a moved module by its old name, as a module with the same objects.

    A finder, rather than files of the old names, keeps old names out of the folders, and covers
    `import`, `importlib`, pickles and the class paths in configurations alike.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if current_name(fullname) != fullname else None

    def exec_module(self, module: ModuleType) -> None:
        new = current_name(module.__name__)
        warn_renamed(module.__name__, new)
        names = vars(import_module(new)).items()
        vars(module).update({name: value for name, value in names if not name.startswith("__")})


def find_moved_modules() -> None:
    """Let imports of old module names work, after a search for modules of that name failed."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())


def warn_renamed(old: str, new: str) -> None:
    """Warn whoever called the caller that a public name has changed."""
    message = f"{old} is now {new}; the old name goes with version 0.3"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


def renamed_options(
    **new_names: str,
) -> Callable[[Callable[Options, Result]], Callable[Options, Result]]:
    """Let a function take keyword options by their old names too, with a warning.

    Args:
        new_names: the present name of each old one.
    """

    def decorate(function: Callable[Options, Result]) -> Callable[Options, Result]:
        @wraps(function)
        def call(*args: Options.args, **options: Options.kwargs) -> Result:
            for old in new_names.keys() & options.keys():
                name = function.__qualname__.removesuffix(".__init__")
                warn_renamed(f"{name}({old}=)", f"{new_names[old]}=")
                options[new_names[old]] = options.pop(old)
            return function(*args, **options)

        return call

    return decorate


def renamed_attributes(**names: str) -> Callable[[type[Owner]], type[Owner]]:
    """Let attributes of a class be used by their names of version 0.1, with a warning.

    Args:
        names: the new name for each old one.
    """

    def get(new: str, old: str, instance: object) -> Any:
        warn_renamed(f"{type(instance).__name__}.{old}", new)
        return getattr(instance, new)

    def assign(new: str, old: str, instance: object, value: Any) -> None:
        warn_renamed(f"{type(instance).__name__}.{old}", new)
        setattr(instance, new, value)

    def decorate(owner: type[Owner]) -> type[Owner]:
        for old, new in names.items():
            setattr(owner, old, property(partial(get, new, old), partial(assign, new, old)))
        return owner

    return decorate
