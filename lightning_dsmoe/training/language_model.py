"""The language model as a LightningModule.

Shapes: B batch, T tokens, V vocabulary.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from lightning_dsmoe.decoder import (
    AttentionFactory,
    Decoder,
    DecoderOutput,
    FeedForwardFactory,
    NormFactory,
)
from lightning_dsmoe.finite import is_finite, not_finite, total_norm
from lightning_dsmoe.routing import AllExperts, Selection, SelectionPlan
from lightning_dsmoe.training.checkpointed_model import CheckpointedModel
from lightning_dsmoe.training.objective import Step, consistent_objective, objective
from lightning_dsmoe.training.optimization import (
    check_validated,
    make_optimizer,
    schedule_options,
    step_plateaus,
)
from lightning_dsmoe.training.optimizer_settings import (
    Settings,
    apply_settings,
    changed_settings,
    describe,
    group_settings,
    saved_settings,
)
from lightning_dsmoe.training.routing_losses import RoutingLossWeights
from lightning_dsmoe.training.strategies import check_strategy, shard


class DSMoELanguageModel(CheckpointedModel):
    """Trains a decoder with every expert on every token, held in balance by mutual information.

    L = L_LM + sum over routers of (alpha L_MI + beta L_balance + gamma L_z)
    (arXiv 2404.05567, eq. 6; alpha is separate for feed-forward and attention experts)

    Where training runs a plan, with `SparseFinishing` or a selection below, and delta is not 0,
    every batch runs with all experts too, in about twice the time and with twice the activations in
    memory, and what is trained is

    (L under the plan + L with all experts) / 2 + delta L_consistency
    (R-Drop, arXiv 2106.14448, eq. 4, halved)

    Means are over the tokens of a batch that count, on all data-parallel ranks together, so that
    several processes train as one would. Accumulated batches weigh alike, however many tokens count
    in each.

    Args:
        vocab_size: number of tokens of the vocabulary.
        d_model: width of the model.
        n_layers: number of blocks.
        attention: makes the attention of a block, called as `attention(d_model)`.
        feed_forward: makes its feed-forward layer, called as `feed_forward(d_model)`.
        norm: makes a normalisation, called as `norm(d_model)`.
        max_positions: size of a learned table of positions; None for none.
        tie_embeddings: whether the head shares the weights of the embeddings.
        dropout: probability of dropping embeddings and layer outputs in training.
        checkpoint_activations: recompute each block in the backward pass to save memory.
        compile_blocks: compile each block with `torch.compile`, from `configure_model` on.
        expert_mi_weight: alpha of each feed-forward router.
        attention_mi_weight: alpha of each attention router.
        load_balancing_weight: beta, for mixtures trained sparsely.
        router_z_weight: gamma.
        consistency_weight: delta, to keep predictions under a plan and with all experts alike;
            without effect where training runs all experts.
        expert_selection: feed-forward experts that run in training, and in evaluation without a
            plan; all of them unless a sparsely trained baseline is wanted.
        attention_selection: the same for attention experts.
        optimizer: makes the optimizer from parameter groups.
        lr_scheduler: makes a learning-rate schedule, stepped after every optimizer step.

    Raises:
        ValueError: if a loss weight is negative.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_layers: int,
        *,
        attention: AttentionFactory,
        feed_forward: FeedForwardFactory,
        norm: NormFactory = nn.RMSNorm,
        max_positions: int | None = None,
        tie_embeddings: bool = True,
        dropout: float = 0.0,
        checkpoint_activations: bool = False,
        compile_blocks: bool = False,
        expert_mi_weight: float = 0.02,
        attention_mi_weight: float = 0.02,
        load_balancing_weight: float = 0.0,
        router_z_weight: float = 0.0,
        consistency_weight: float = 0.0,
        expert_selection: Selection = AllExperts(),
        attention_selection: Selection = AllExperts(),
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        weights = (
            expert_mi_weight,
            attention_mi_weight,
            load_balancing_weight,
            router_z_weight,
            consistency_weight,
        )
        if min(weights) < 0:
            raise ValueError(f"loss weights must be 0 or more, got {weights}")
        self.save_hyperparameters()
        self._keep_plain_hyperparameters()
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.n_layers = n_layers
        self.attention = attention
        self.feed_forward = feed_forward
        self.norm = norm
        self.max_positions = max_positions
        self.tie_embeddings = tie_embeddings
        self.dropout = dropout
        self.checkpoint_activations = checkpoint_activations
        self.compile_blocks = compile_blocks
        self.expert_mi_weight = expert_mi_weight
        self.attention_mi_weight = attention_mi_weight
        self.load_balancing_weight = load_balancing_weight
        self.router_z_weight = router_z_weight
        self.consistency_weight = consistency_weight
        self.plan = SelectionPlan.uniform(
            n_layers, experts=expert_selection, attention=attention_selection
        )
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self._settings: Settings | None = None
        self._resumed: dict[str, Any] | None = None
        self._resumed_settings: Settings | None = None
        self.val_loss = MeanMetric(nan_strategy=math.nan)  # a NaN stays one
        self.test_loss = MeanMetric(nan_strategy=math.nan)
        self.decoder = Decoder(
            vocab_size,
            d_model,
            n_layers,
            attention=attention,
            feed_forward=feed_forward,
            norm=norm,
            max_positions=max_positions,
            tie_embeddings=tie_embeddings,
            dropout=dropout,
            checkpoint_activations=checkpoint_activations,
        )
        self.plan.check(*self.decoder.plan_sizes)

    def setup(self, stage: str) -> None:
        """Prepare a run, without what an earlier one may have left of a checkpoint."""
        super().setup(stage)
        self._resumed = self._resumed_settings = None

    def configure_model(self) -> None:
        """Shard the decoder where the strategy shards, then compile its blocks; each once."""
        if self._trainer is not None:
            check_strategy(self._trainer)
        if self.device_mesh is not None:
            shard(self.decoder, self.device_mesh["data_parallel"])
        if self.compile_blocks:
            for block in self.decoder.blocks:
                # Set by `compile`, and gone after a copy or in a spawned process.
                if block._compiled_call_impl is None:
                    block.compile()

    def forward(self, tokens: Tensor, plan: SelectionPlan | None = None) -> DecoderOutput:
        """Logits `[B, T, V]` and routings for tokens `[B, T]`.

        Args:
            tokens: whole numbers below V.
            plan: the experts that run; None runs those of training, by default all.
        """
        output: DecoderOutput = self.decoder(tokens, self.plan if plan is None else plan)
        return output

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Total loss of a batch; logs its terms."""
        weights, group = self._routing_loss_weights(), self._data_parallel_group()
        step = self._step(batch, self.plan, group)
        dense = SelectionPlan.uniform(self.n_layers)
        if self.consistency_weight and self.plan != dense:
            total, terms = consistent_objective(
                step, self._step(batch, dense, group), weights, self.consistency_weight, group
            )
        else:
            total, terms = objective(step, weights, group)
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"the loss is {total.item()} at step {self.global_step}, batch {batch_idx} "
                f"(language model {step.loss.item()}, {_format(terms)}); no step was taken"
            )
        self.log("train/loss", step.loss, prog_bar=True)
        if self._logs_are_due():
            self.log_dict({f"train/{name}": value for name, value in terms.items()})
        return {"loss": total, **step.results()}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Language-model loss of a validation batch."""
        return self._evaluate(batch, self.val_loss, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Language-model loss of a test batch."""
        return self._evaluate(batch, self.test_loss, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Negative log-likelihood of each token in nats, `[B, T]`, 0 where labels are ignored."""
        logits_BTV = self(batch["input_ids"]).logits
        return F.cross_entropy(logits_BTV.mT.float(), batch["labels"], reduction="none")

    def on_validation_epoch_start(self) -> None:
        """Begin the mean over the split, with state that later runs may change too."""
        _begin(self.val_loss)

    def on_test_epoch_start(self) -> None:
        """Begin the mean over the split."""
        _begin(self.test_loss)

    def on_validation_epoch_end(self) -> None:
        """Log the loss over the whole split, and step the schedules that watch a metric.

        They step before this validation's checkpoint is written, so that it holds the step.
        """
        self._log_epoch(self.val_loss, "val")
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            step_plateaus(self.trainer)

    def on_test_epoch_end(self) -> None:
        """Log the loss over the whole split."""
        self._log_epoch(self.test_loss, "test")

    def configure_optimizers(self) -> Any:
        """Optimizer, without weight decay of norms and biases, and the schedule.

        A schedule steps after every optimizer step, `lightning.pytorch.cli.ReduceLROnPlateau` after
        every validation.
        """
        optimizer = make_optimizer(self.optimizer, self)
        groups = group_settings(optimizer)
        schedule = None if self.lr_scheduler is None else self.lr_scheduler(optimizer)
        self._settings = describe(optimizer, groups, schedule)
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": schedule_options(schedule)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the settings of optimizer and schedule to what a checkpoint tells."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["optimizer_settings"] = self._settings

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check a checkpoint, and keep its settings until the optimizer has its state."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and self._trainer.state.fn == "fit":
            self._resumed = checkpoint

    def on_fit_start(self) -> None:
        """Refuse an optimizer that cannot go on from the state which Lightning restores next."""
        self._read_resumed_settings()

    def on_train_start(self) -> None:
        """Let optimizer and schedule settings of this run hold over those that were restored."""
        check_validated(self.trainer)
        self._read_resumed_settings()  # strategies that shard load checkpoints after `on_fit_start`
        before, now, self._resumed_settings = self._resumed_settings, self._settings, None
        if before is None or now is None or not (changes := changed_settings(before, now)):
            return
        rank_zero_info(f"Resumed with new settings: {'; '.join(changes)}")
        configs = self.trainer.lr_scheduler_configs
        schedule = apply_settings(
            before,
            now,
            self.trainer.optimizers[0],
            configs[0].scheduler if configs else None,
            self.lr_scheduler,
            self.global_step,
        )
        if configs:
            configs[0].scheduler = schedule

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step a schedule, unless it waits for a validation."""
        if metric is not None or not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Check that gradients are finite, then clip them, also those of a fused optimizer.

        Raises:
            FloatingPointError: if they are not, unless the precision scales gradients, which then
                leaves out the step by itself.
        """
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
            return
        # Not by `super`: Lightning 2.6.6 refuses fused optimizers under mixed precision, since some
        # scale gradients themselves, and would take the norm a second time.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = total_norm(p.grad for p in parameters if p.grad is not None)
        if not is_finite(norm):
            gradients = {n: p.grad for n, p in self.named_parameters() if p.grad is not None}
            raise FloatingPointError(
                f"the gradient is not finite at step {self.global_step}, batch "
                f"{self.trainer.fit_loop.batch_idx} ({not_finite(gradients) or 'its norm'}); "
                "no step was taken"
            )
        gradient_clip_val = gradient_clip_val or self.trainer.gradient_clip_val
        if not gradient_clip_val or gradient_clip_val < 0:
            return
        algorithm = gradient_clip_algorithm or self.trainer.gradient_clip_algorithm or "norm"
        if GradClipAlgorithmType(algorithm) == GradClipAlgorithmType.VALUE:
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        else:
            nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def _read_resumed_settings(self) -> None:
        checkpoint, now, self._resumed = self._resumed, self._settings, None
        if checkpoint is None or now is None:
            return
        self._resumed_settings = saved_settings(checkpoint, now)
        changed_settings(self._resumed_settings, now)
        if self._resumed_settings["schedule"] != now["schedule"]:
            checkpoint["lr_schedulers"] = []  # another one cannot read its state

    def _step(
        self,
        batch: dict[str, Tensor],
        plan: SelectionPlan,
        group: dist.ProcessGroup | None = None,
    ) -> Step:
        return Step.of(self(batch["input_ids"], plan), batch["labels"], plan, group)

    def _evaluate(self, batch: dict[str, Tensor], metric: MeanMetric, split: str) -> dict[str, Any]:
        step = self._step(batch, self.plan)
        count = step.mask_BT.sum()
        metric.update(step.loss, count)
        _, terms = objective(step, self._routing_loss_weights())
        self.log_dict(
            {f"{split}/{name}": value for name, value in terms.items()},
            batch_size=max(1, int(count)),
            sync_dist=True,
        )
        return {"loss": step.loss, **step.results()}

    def _log_epoch(self, metric: MeanMetric, split: str) -> None:
        loss = metric.compute()
        bits = loss / math.log(2)
        # Alike on all ranks already; Lightning warns where it is not told to average them.
        self.log(f"{split}/loss", loss, prog_bar=True, sync_dist=True)
        self.log(f"{split}/perplexity", loss.exp(), sync_dist=True)
        data = self._data()
        if hasattr(data, "bytes_per_token"):
            per_byte = bits / data.bytes_per_token(split)
            self.log(f"{split}/bits_per_byte", per_byte, sync_dist=True)
            per_char = bits / data.chars_per_token(split)
            self.log(f"{split}/bits_per_char", per_char, sync_dist=True)

    def _routing_loss_weights(self) -> RoutingLossWeights:
        return RoutingLossWeights(
            self.expert_mi_weight,
            self.attention_mi_weight,
            self.load_balancing_weight,
            self.router_z_weight,
        )

    def _logs_are_due(self) -> bool:
        """Whether loggers write what this step logs; preparing it costs time at every step."""
        if self._trainer is None:
            return False
        every = self._trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(every) and (self.global_step + 1) % every == 0

    def _data_parallel_group(self) -> dist.ProcessGroup | None:
        if not (dist.is_available() and dist.is_initialized()):
            return None
        mesh = self.device_mesh
        return dist.group.WORLD if mesh is None else mesh["data_parallel"].get_group()


def _begin(mean: MeanMetric) -> None:
    """Begin a mean in full precision, from which half-precision training takes metrics too."""
    mean.set_dtype(torch.promote_types(mean.mean_value.dtype, torch.float32))
    mean.reset()


def _format(terms: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
