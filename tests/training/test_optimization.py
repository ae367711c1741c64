"""Parameter groups and schedules."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_dsmoe.attention import GroupedQueryAttention
from lightning_dsmoe.routing import CosineRouter, MLPRouter
from lightning_dsmoe.training.language_model import DSMoELanguageModel
from lightning_dsmoe.training.optimization import is_hidden_matrix, parameter_groups

MakeModel = Callable[..., DSMoELanguageModel]


def names_of(model: DSMoELanguageModel, group: dict[str, Any]) -> set[str]:
    members = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in members}


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_matrices_decay_but_biases_and_norms_do_not(make_model: MakeModel, norm: Any) -> None:
    model = make_model(norm=norm, optimizer=partial(torch.optim.AdamW, weight_decay=0.3))
    decayed, rest = model.configure_optimizers().param_groups
    assert decayed["weight_decay"] == 0.3
    assert rest["weight_decay"] == 0
    names = names_of(model, decayed), names_of(model, rest)
    assert names[0] | names[1] == {name for name, _ in model.named_parameters()}
    assert not names[0] & names[1]
    decayed_kinds = {".".join(name.split(".")[-2:]) for name in names[0]}
    assert decayed_kinds >= {"embedding.weight", "router.weight", "w_in.weight", "w_q.weight"}
    assert not any(word in name for name in names[0] for word in ("norm", "bias", "b_in", "b_q"))
    assert all("norm" in n or "bias" in n or ".b_" in n for n in names[1])


def test_vectors_of_more_dimensions_do_not_decay() -> None:
    """Norms over all heads, which no optimizer may take for stacks of matrices either."""
    layer = GroupedQueryAttention(8, n_heads=4, n_kv_heads=2, d_head=4, qk_norm="projection")
    _, rest = parameter_groups(layer)
    assert {name for name, _ in rest["params"]} == {"heads.q_norm.weight", "heads.k_norm.weight"}
    assert not is_hidden_matrix("heads.q_norm.weight", layer.heads.q_norm.weight)


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head", "transformer.wte", "a.router"])
def test_embeddings_heads_and_routers_are_no_hidden_matrices(name: str) -> None:
    assert not is_hidden_matrix(f"{name}.weight", torch.ones(2, 3))
    assert is_hidden_matrix("model.layers.0.self_attn.q_proj.weight", torch.ones(2, 3))


@pytest.mark.parametrize("router", [MLPRouter, CosineRouter])
def test_every_parameter_of_other_routers_is_optimized_once(
    make_one_model: MakeModel, router: Any
) -> None:
    feed_forward = partial(make_one_model().feed_forward, router=router)
    model = make_one_model(feed_forward=feed_forward)
    groups = model.configure_optimizers().param_groups
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_mixed_precision_clips_gradients_of_any_optimizer(
    fused: bool,
    algorithm: str,
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
) -> None:
    """Lightning refuses fused optimizers there, as some scale gradients themselves."""
    sizes = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            gradients = torch.cat([p.grad.flatten() for p in pl_module.parameters()])
            size = gradients.norm() if algorithm == "norm" else gradients.abs().max()
            sizes.append(size.item())

    model = make_one_model(optimizer=partial(torch.optim.AdamW, lr=1e-4, fused=fused))
    trainer = make_trainer(
        precision="bf16-mixed",
        max_steps=3,
        gradient_clip_val=1e-3,
        gradient_clip_algorithm=algorithm,
        callbacks=[Watch()],
    )
    trainer.fit(model, make_loader(), make_loader(3))
    assert sizes == pytest.approx([1e-3] * 3, rel=1e-3)


def test_a_schedule_steps_after_every_optimizer_step(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    outputs: Any,
) -> None:
    model = make_one_model(
        optimizer=partial(torch.optim.SGD, lr=1.0),
        lr_scheduler=partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    )
    trainer = make_trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[outputs])
    trainer.fit(model, make_loader(9), make_loader(3))
    assert outputs.rates == pytest.approx([1, 1, 1 / 2, 1 / 3, 1 / 3])


def test_without_a_schedule_the_rate_stays(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    outputs: Any,
) -> None:
    model = make_one_model(optimizer=partial(torch.optim.SGD, lr=0.25))
    make_trainer(max_steps=3, callbacks=[outputs]).fit(model, make_loader(), make_loader(3))
    assert outputs.rates == [0.25] * 3


def test_a_schedule_that_watches_a_metric_steps_after_validation(
    make_one_model: MakeModel,
    make_loader: Callable[..., Any],
    make_trainer: Callable[..., Trainer],
    outputs: Any,
) -> None:
    """A loss that never falls by half halves the rate at every validation but the first."""
    schedule = partial(ReduceLROnPlateau, monitor="val/loss", factor=0.5, patience=0, threshold=0.5)
    model = make_one_model(optimizer=partial(torch.optim.SGD, lr=1e-4), lr_scheduler=schedule)
    trainer = make_trainer(
        max_steps=8, val_check_interval=2, check_val_every_n_epoch=None, callbacks=[outputs]
    )
    trainer.fit(model, make_loader(30), make_loader(3))
    assert outputs.rates == pytest.approx([1e-4] * 4 + [5e-5] * 2 + [2.5e-5] * 2)


def test_schedules_that_cannot_watch_their_metric(
    make_one_model: MakeModel, make_loader: Callable[..., Any], make_trainer: Callable[..., Trainer]
) -> None:
    plain = torch.optim.lr_scheduler.ReduceLROnPlateau
    with pytest.raises(ValueError, match=r"use lightning\.pytorch\.cli\.ReduceLROn"):
        make_one_model(lr_scheduler=plain).configure_optimizers()
    watching = make_one_model(lr_scheduler=partial(ReduceLROnPlateau, monitor="train/loss"))
    with pytest.raises(ValueError, match="steps after each validation, and this run has none"):
        make_trainer(max_steps=1, limit_val_batches=0).fit(watching, make_loader(), make_loader(3))
    model = make_one_model(lr_scheduler=partial(ReduceLROnPlateau, monitor="val_loss"))
    trainer = make_trainer(max_steps=1, val_check_interval=1)
    with pytest.raises(ValueError, match=r"watches 'val_loss', which is not logged; .* val/loss"):
        trainer.fit(model, make_loader(), make_loader(3))


def test_an_optimizer_of_single_matrices_is_refused(make_one_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"use lightning_dsmoe\.optimizers\.MuonWithAdamW"):
        make_one_model(optimizer=torch.optim.Muon).configure_optimizers()


class OwnPlateau(DSMoELanguageModel):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, threshold=9, patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"},
        }


def test_a_schedule_of_a_subclass_steps_as_lightning_does(
    make_one_model: MakeModel, make_loader: Callable[..., Any], make_trainer: Callable[..., Trainer]
) -> None:
    model = make_one_model()
    model.__class__ = OwnPlateau
    trainer = make_trainer(max_epochs=3)
    trainer.fit(model, make_loader(3), make_loader(3))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-6)
