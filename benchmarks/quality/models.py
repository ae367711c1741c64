"""The models that `reproduce.py` compares, and how they are trained.

All are variants of one recipe, `cli_configs/shakespeare_nano.yaml`, so a change of that file
changes all of them.
"""

import copy
from importlib.resources import files
from typing import Any, NamedTuple

import yaml

from benchmarks.quality.finishing import FINISHINGS, Config, at_threshold, consistently, top_k

RECIPE = "shakespeare_nano.yaml"
MI_WEIGHTS = {"weak MI": (0.01, 0.01), "middle MI": (0.02, 0.02), "strong MI": None}
"""Weight of the loss of each feed-forward and each attention router; None for the recipe's."""
SMALLER_MI_WEIGHTS = {
    "faintest MI": (0.001, 0.001),
    "faint MI": (0.0025, 0.0025),
    "light MI": (0.005, 0.005),
}
"""Those that the claims are not about."""
LOAD_BALANCING_WEIGHT = 0.01
SPARSE_PART = 6
"""One in so many feed-forward experts runs in a sparsely trained model, beside all attention."""

DENSE, SMALL_DENSE = "dense", "dense, active size"
SAME_TOTAL, SAME_ACTIVE, TOP_1 = "SMoE, same total", "SMoE, same active", "SMoE, top-1 of both"
ALL_WEIGHTS: dict[str, tuple[float, float] | None] = {**SMALLER_MI_WEIGHTS, **MI_WEIGHTS}
EVERY_DS_MOE = {strength: f"DS-MoE, {strength}" for strength in ALL_WEIGHTS}
DS_MOE = {strength: EVERY_DS_MOE[strength] for strength in MI_WEIGHTS}
MODELS = (DENSE, SMALL_DENSE, SAME_TOTAL, SAME_ACTIVE, TOP_1, *DS_MOE.values())
"""What the claims are about."""
ANNEALED, STEERED = "DS-MoE, annealed to strong MI", "DS-MoE, steered from weak MI"
FALLING = {
    "DS-MoE, falling MI, finished": at_threshold(0.5, 0.4),
    "DS-MoE, falling MI, finished consistently": consistently(at_threshold(0.5, 0.4)),
}
"""Weights that fall to 0, and how these models are finished: all under a threshold."""
FINISHED = {
    f"{name}, {finishing}": (strength, finishing)
    for strength, name in EVERY_DS_MOE.items()
    for finishing in FINISHINGS
}
OTHER_WAYS = (
    ANNEALED,
    STEERED,
    *FALLING,
    *(EVERY_DS_MOE[strength] for strength in SMALLER_MI_WEIGHTS),
    *FINISHED,
)
"""Other ways of training DS-MoE, to compare it with."""


class Preset(NamedTuple):
    """How long to train, and what differs from the recipe.

    Args:
        steps: optimizer steps.
        validate_every: steps between validations, of which the best one's weights are kept; None
            for a single one at the end.
        changes: arguments in place of the recipe's, of the model, its attention and feed_forward,
            the data and the trainer.
    """

    steps: int
    validate_every: int | None
    changes: dict[str, Config]


PRESETS = {
    "cpu": Preset(2000, None, {}),
    # About six times as many parameters.
    "large": Preset(
        2000,
        None,
        {
            "model": {"d_model": 256, "n_layers": 6},
            "attention": {"n_experts": 8, "n_heads": 1, "d_head": 32},
            "feed_forward": {"n_experts": 18, "d_expert": 64},
        },
    ),
    # nanoGPT's config/train_shakespeare_char.py: 10.7 M parameters, best validation loss 1.4697.
    "gpu": Preset(
        5000,
        250,
        {
            "model": {"d_model": 384, "n_layers": 6, "dropout": 0.2},
            "attention": {"n_experts": 6, "n_heads": 1, "d_head": 64},
            "feed_forward": {"n_experts": 29, "d_expert": 64},
            "data": {"context": 256, "batch_size": 64},
            "trainer": {"precision": "bf16-mixed"},
        },
    ),
}


def configuration(name: str, preset: Preset, *, seed: int, steps: int) -> Config:
    """The whole configuration of a run, but for the text.

    Args:
        name: one of `MODELS` or `OTHER_WAYS`.
        preset: what to train like.
        seed: of the weights and of the order of the text.
        steps: optimizer steps.
    """
    text = files("lightning_dsmoe.cli_configs").joinpath(RECIPE).read_text(encoding="utf-8")
    config: Config = yaml.safe_load(text)
    model, data = (config[part]["init_args"] for part in ("model", "data"))
    parts = {
        "model": model,
        "attention": model["attention"]["init_args"],
        "feed_forward": model["feed_forward"]["init_args"],
        "data": data,
        "trainer": config["trainer"],
    }
    for part, arguments in preset.changes.items():
        parts[part] |= arguments
    model |= variants(model)[name]
    schedule = model["lr_scheduler"]["init_args"]
    schedule |= {"max_steps": steps, "warmup_steps": min(schedule["warmup_steps"], steps // 20)}
    data["seed"] = seed
    config["seed_everything"] = seed
    config["trainer"] |= {
        "max_steps": steps,
        "val_check_interval": min(preset.validate_every or steps, steps),
        "callbacks": [_BEST, *further_callbacks(name, steps)],
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return copy.deepcopy(config)


def variants(model: Config) -> dict[str, Config]:
    """Arguments of each model in place of those of DS-MoE, by its name.

    Those trained sparsely are so as in the paper: experts in the feed-forward layers alone, and the
    loss of the Switch Transformer. `TOP_1` is the exception, with experts in attention too.

    Args:
        model: arguments of DS-MoE.
    """
    experts, attention = (model[kind]["init_args"] for kind in ("feed_forward", "attention"))
    n_experts, d_expert = experts["n_experts"], experts["d_expert"]
    k = max(1, round(n_experts / SPARSE_PART))
    heads = {
        "class_path": "lightning_dsmoe.attention.GroupedQueryAttention",
        "init_args": {
            "n_heads": attention["n_experts"] * attention["n_heads"],
            "n_kv_heads": attention["n_heads"],
            **_kept(attention, "d_head", "rope_theta", "qk_norm", "bias"),
        },
    }

    def dense(d_hidden: int) -> Config:
        options = {"d_hidden": d_hidden, **_kept(experts, "experts")}
        layer = {"class_path": "lightning_dsmoe.experts.FeedForward", "init_args": options}
        return {"attention": heads, "feed_forward": layer}

    def sparse(n: int) -> Config:
        layer = {**model["feed_forward"], "init_args": {**experts, "n_experts": n}}
        return {"attention": heads, "feed_forward": layer, "expert_selection": top_k(k), **_SWITCH}

    names = ("expert_mi_weight", "attention_mi_weight")
    by_strength: dict[str, Config] = {
        strength: {} if given is None else dict(zip(names, given, strict=True))
        for strength, given in ALL_WEIGHTS.items()
    }
    return {
        DENSE: dense(n_experts * d_expert),
        SMALL_DENSE: dense(k * d_expert),
        SAME_TOTAL: sparse(n_experts),
        SAME_ACTIVE: sparse(2 * n_experts),
        TOP_1: {"expert_selection": top_k(1), "attention_selection": top_k(1), **_SWITCH},
        **{name: by_strength[strength] for strength, name in EVERY_DS_MOE.items()},
        **{
            name: by_strength[strength] | FINISHINGS[finishing].changes
            for name, (strength, finishing) in FINISHED.items()
        },
        ANNEALED: by_strength["strong MI"],
        STEERED: by_strength["weak MI"],
        **{
            name: dict.fromkeys(names, 0.015) | finishing.changes
            for name, finishing in FALLING.items()
        },
    }


def further_callbacks(name: str, steps: int) -> list[Config]:
    """What the callbacks of this library do in the training of a model."""
    if name == ANNEALED:
        return [_callback("MIWeightAnnealing", steps=max(1, steps // 2))]
    if name == STEERED:
        return [_callback("SparsityTarget", expert_top_k=2, attention_top_k=1, mass=0.99)]
    if name in FINISHED:
        return [FINISHINGS[FINISHED[name][1]].callback(steps)]
    if name in FALLING:
        fall = _callback("MIWeightAnnealing", start=1.0, end=0.0, steps=steps)
        return [fall, FALLING[name].callback(steps)]
    return []


_SWITCH = {
    "load_balancing_weight": LOAD_BALANCING_WEIGHT,
    "expert_mi_weight": 0.0,
    "attention_mi_weight": 0.0,
}
_BEST = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"monitor": "val/loss", "save_weights_only": True},
}


def _callback(name: str, **options: Any) -> Config:
    return {"class_path": f"lightning_dsmoe.callbacks.{name}", "init_args": options}


def _kept(arguments: Config, *names: str) -> Config:
    return {name: arguments[name] for name in names if name in arguments}
