"""Steps that are not finite are left out, counted, and at last end training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_dsmoe.callbacks import SkipNonFiniteSteps
from lightning_dsmoe.training import bad_step
from lightning_dsmoe.training.language_model import DSMoELanguageModel

from .classifier import Classifier, classifier, loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but:UserWarning"),
    # From inside of Lightning; `pytest.warns` tells it once more, from elsewhere.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]
WARNING = r"the (loss|gradient) is .*; the step is left out, \d+ of at most"


class Spoil(Callback):
    """Spoils the loss, or one gradient, of some batches; notes weights after each."""

    def __init__(self, *, losses: tuple[int, ...] = (), gradients: tuple[int, ...] = ()) -> None:
        self.losses, self.gradients = losses, gradients
        self.weights: list[Tensor] = []

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        if trainer.fit_loop.batch_idx in self.losses:
            loss.data.fill_(float("nan"))  # its gradients stay finite

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fit_loop.batch_idx in self.gradients:
            next(pl_module.parameters()).grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.weights.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))

    def changed(self) -> list[bool]:
        """Whether each batch but the first has changed the weights."""
        pairs = zip(self.weights[:-1], self.weights[1:], strict=True)
        return [not torch.equal(a, b) for a, b in pairs]


class WithMomentum(Classifier):
    """Moves weights without a gradient too: by momentum and weight decay."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1, fused=True)


def fit(make_trainer: Callable[..., Trainer], *callbacks: Callback, **options: Any) -> Trainer:
    torch.manual_seed(3)
    trainer = make_trainer(**{"max_steps": 6, "callbacks": list(callbacks), **options})
    trainer.fit(WithMomentum(), loader(48))
    return trainer


@pytest.mark.parametrize("gradient", [1.0, float("nan")])
def test_ranks_ask_for_the_same_shards_whatever_their_losses(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, gradient: float
) -> None:
    asked: list[str] = []
    for name in ("is_finite", "not_finite"):
        original = getattr(bad_step, name)

        def ask(given: Any, name: str = name, original: Any = original) -> Any:
            asked.append(name)
            return original(given)

        monkeypatch.setattr(bad_step, name, ask)
    module = fit(make_trainer, max_steps=1).lightning_module
    norm = torch.tensor(gradient)
    of_rank = []
    for loss in (1.0, float("nan")):
        losses = bad_step.StepLosses()
        losses.add(0, None, torch.tensor(loss))
        asked.clear()
        problem = bad_step.problem_of(module, losses, norm)
        assert problem.startswith("the loss is nan") == (loss != loss)
        of_rank.append(list(asked))
    assert of_rank[0] == of_rank[1]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("kind", ["losses", "gradients"])
def test_a_bad_step_changes_nothing(
    make_trainer: Callable[..., Trainer], kind: str, clip: float | None
) -> None:
    spoil, skip = Spoil(**{kind: (2, 4)}), SkipNonFiniteSteps(limit=2)
    with pytest.warns(UserWarning, match=WARNING):
        trainer = fit(make_trainer, spoil, skip, gradient_clip_val=clip)
    assert spoil.changed() == [True, False, True, False, True]
    assert skip.skipped == 2
    assert trainer.callback_metrics["train/skipped_steps"] == 2
    assert trainer.global_step == 6
    [optimizer] = trainer.optimizers
    assert {int(state["step"]) for state in optimizer.state.values()} == {4}


def test_accumulated_batches_are_left_out_together(make_trainer: Callable[..., Trainer]) -> None:
    spoil, skip = Spoil(gradients=(2,)), SkipNonFiniteSteps()
    with pytest.warns(UserWarning, match=WARNING):
        fit(make_trainer, spoil, skip, max_steps=3, accumulate_grad_batches=2)
    # Of the steps that end in batches 1, 3 and 5 the second is left out, for its first batch.
    assert spoil.changed() == [True, False, False, False, True]
    assert skip.skipped == 1


def test_without_bad_steps_training_is_the_same(make_trainer: Callable[..., Trainer]) -> None:
    plain, watched, skip = Spoil(), Spoil(), SkipNonFiniteSteps()
    fit(make_trainer, plain, max_steps=3)
    fit(make_trainer, watched, skip, max_steps=3)
    assert torch.equal(plain.weights[-1], watched.weights[-1])
    assert skip.skipped == 0


def test_more_than_the_limit_end_training_with_the_layers(
    make_trainer: Callable[..., Trainer],
) -> None:
    message = (
        r"(?s)the gradient is not finite at step 4, batch 4 \(encoder\.embedding\.weight\); no "
        r"step was taken, and limit=1 others of this run were left out before\n"
        r"  batch: epoch 0, batch 4 of the epoch\n.*"
        r"forward pass: none\n  largest outputs: encoder\.embedding \d.*encoder\.blocks \S+ \S+, "
        r".*last layer first: encoder\.embedding\.weight\n"
    )
    spoil = Spoil(gradients=(2, 4))
    with (
        pytest.warns(UserWarning, match=WARNING),
        pytest.raises(FloatingPointError, match=message),
    ):
        fit(make_trainer, spoil, SkipNonFiniteSteps(limit=1))
    assert spoil.changed() == [True, False, True]


def test_the_limit_holds_over_resumed_parts(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=WARNING):
        first = fit(make_trainer, Spoil(losses=(0,)), SkipNonFiniteSteps(limit=1), max_steps=12)
    first.save_checkpoint(tmp_path / "one.ckpt")
    second = make_trainer(max_steps=24, callbacks=[Spoil(losses=(1,)), SkipNonFiniteSteps(limit=1)])
    with pytest.raises(FloatingPointError, match="limit=1 others"):
        second.fit(WithMomentum(), loader(48), ckpt_path=tmp_path / "one.ckpt", weights_only=True)


def test_the_language_model_is_not_stopped(
    make_model: Callable[..., DSMoELanguageModel],
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    class NaNHead(Callback):
        """Weights that are not finite for one batch, which so has a loss that is not."""

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            pl_module.get_parameter("decoder.norm.weight").data.fill_(
                float("nan") if trainer.global_step == 1 else 1.0
            )

    skip, model = SkipNonFiniteSteps(), make_model()
    trainer = make_trainer(max_steps=3, callbacks=[NaNHead(), skip])
    with pytest.warns(UserWarning, match="the loss is nan at step 1, batch 1"):
        trainer.fit(model, make_loader(4))
    assert skip.skipped == 1
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_manual_optimization_and_limits_below_0_are_refused(
    make_trainer: Callable[..., Trainer],
) -> None:
    with pytest.raises(ValueError, match="limit must be at least 0, got -1"):
        SkipNonFiniteSteps(limit=-1)
    model = classifier()
    model.automatic_optimization = False
    with pytest.raises(ValueError, match="SkipNonFiniteSteps counts optimizer steps"):
        make_trainer(max_steps=1, callbacks=[SkipNonFiniteSteps()]).fit(model, loader(4))
