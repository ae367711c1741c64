"""The language model as a LightningModule.

Shapes: B sequences, T positions, V vocabulary.
"""

import math
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import torch
from einops import rearrange
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dsmoe import decoder
from lightning_dsmoe.data.loader import Batch
from lightning_dsmoe.losses import RoutingLoss
from lightning_dsmoe.moved import renamed_attributes
from lightning_dsmoe.routing import AllExperts, Selection, SelectionPlan, run_plan
from lightning_dsmoe.routing.running import running_plan
from lightning_dsmoe.training import checkpoints, strategies
from lightning_dsmoe.training.evaluation_loss import EvaluationLoss
from lightning_dsmoe.training.objective import Step, consistent_objective, objective
from lightning_dsmoe.training.resumable_module import ResumableModule

Factory = TypeVar("Factory", decoder.AttentionFactory, decoder.FeedForwardFactory)


@renamed_attributes(
    expert_mi_weight="routing_loss.expert_mi",
    attention_mi_weight="routing_loss.attention_mi",
    load_balancing_weight="routing_loss.load_balancing",
    router_z_weight="routing_loss.router_z",
)
class DSMoELanguageModel(ResumableModule):
    """Language model that trains all experts on every token, with a mutual-information loss.

    L = L_LM + sum over routers of (alpha L_MI + beta L_balance + gamma L_z)
    (arXiv 2404.05567, eq. 6; alpha is separate for feed-forward and attention experts)

    Where training runs a plan, with `SparseFinishing` or a selection below, and delta is not 0,
    every batch runs with all experts too, in about twice the time and with twice the activations in
    memory, and the loss is

    (L under the plan + L with all experts) / 2 + delta L_consistency
    (R-Drop, arXiv 2106.14448, eq. 4, halved)

    Means are over the tokens of a batch that count, on all data-parallel ranks together, so that
    several processes train as one would. Accumulated batches have equal weights, however many
    tokens count in each.

    Args:
        vocab_size: vocabulary size V; the command line takes it from the data.
        d_model: model width D.
        n_layers: number of blocks L.
        attention: factory of the attention layer of a block, called as `attention(d_model)`; a list
            has one for each block.
        feed_forward: factory of its feed-forward layer, called as `feed_forward(d_model)`; a list
            has one for each block.
        norm: factory of a normalization layer, called as `norm(d_model)`.
        max_positions: number of learned position embeddings; None for none, as with rotary ones.
        tie_embeddings: whether the output head shares the weights of the embeddings.
        dropout: dropout probability of embeddings and layer outputs.
        checkpoint_activations: recompute each block in the backward pass to save memory.
        compile_blocks: compile each block with `torch.compile` before training.
        expert_mi_weight: alpha, weight of the MI loss of each feed-forward router.
        attention_mi_weight: alpha, weight of the MI loss of each attention router.
        load_balancing_weight: beta, weight of the load-balancing loss of each router, for
            mixtures trained sparsely.
        router_z_weight: gamma, weight of the z-loss of each router.
        consistency_weight: delta, weight of the loss between predictions under a plan and with all
            experts; without effect where training runs all experts.
        expert_selection: feed-forward experts that run in training, and in evaluation without a
            plan; all of them, except for a sparsely trained baseline.
        attention_selection: the same for attention experts.
        optimizer: factory of the optimizer, called with parameter groups.
        lr_scheduler: factory of a learning-rate schedule, stepped after every optimizer step.

    Raises:
        ValueError: if a loss weight is negative or a selection does not fit a layer.

    Examples:
        >>> from functools import partial
        >>> import torch
        >>> from lightning_dsmoe import DSMoELanguageModel, MixtureOfAttentionHeads
        >>> from lightning_dsmoe import MixtureOfExperts, SelectionPlan, TopK
        >>> model = DSMoELanguageModel(
        ...     vocab_size=100,
        ...     d_model=16,
        ...     n_layers=2,
        ...     attention=partial(MixtureOfAttentionHeads, n_experts=2, n_heads=1, d_head=8),
        ...     feed_forward=partial(MixtureOfExperts, n_experts=4, d_expert=8),
        ... )
        >>> tokens = torch.arange(12).reshape(2, 6)
        >>> logits, routings = model(tokens)
        >>> logits.shape
        torch.Size([2, 6, 100])
        >>> routings.experts[0].probs.shape
        torch.Size([2, 6, 4])
        >>> plan = SelectionPlan(experts=TopK(1))
        >>> model(tokens, plan).logits.shape
        torch.Size([2, 6, 100])
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_layers: int,
        *,
        attention: list[decoder.AttentionFactory] | decoder.AttentionFactory,
        feed_forward: list[decoder.FeedForwardFactory] | decoder.FeedForwardFactory,
        norm: decoder.NormFactory = nn.RMSNorm,
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
        super().__init__(optimizer, lr_scheduler)
        self.save_hyperparameters()
        checkpoints.drop_objects(self.hparams)
        self.vocab_size, self.d_model, self.n_layers = vocab_size, d_model, n_layers
        attention, feed_forward = _one_for_all(attention), _one_for_all(feed_forward)
        self.attention, self.feed_forward, self.norm = attention, feed_forward, norm
        self.max_positions, self.tie_embeddings = max_positions, tie_embeddings
        self.dropout, self.checkpoint_activations = dropout, checkpoint_activations
        self.compile_blocks = compile_blocks
        if not 0 <= consistency_weight < math.inf:
            raise ValueError(f"consistency_weight must be 0 or more, got {consistency_weight}")
        self.consistency_weight = consistency_weight
        self.routing_loss = RoutingLoss(
            expert_mi_weight, attention_mi_weight, load_balancing_weight, router_z_weight
        )
        self.plan = SelectionPlan(expert_selection, attention_selection)
        self.decoder = decoder.Decoder(
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
        self.decoder.selections(self.plan)  # raises where one does not fit

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO[Any],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> Self:
        """Rebuild a model from a checkpoint file, importing nothing that the file names.

        Args:
            checkpoint_path: the file, or one that is open, at its beginning.
            map_location: device for the weights, or what else `torch.load` takes.
            hparams_file: YAML with the arguments of the model instead of those in the file.
            strict: as in Lightning; the names and shapes of the weights are always checked.
            weights_only: refuse files that hold more than data. False trusts the file fully.
            **kwargs: arguments of the model in place of those in the file; a model built in Python
                needs its factories here.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not a checkpoint of this class, is of another model, or names
                a class that is not known.
        """
        return checkpoints.load_checked(
            cls,
            super().load_from_checkpoint,
            checkpoint_path,
            map_location=map_location,
            hparams_file=hparams_file,
            strict=strict,
            weights_only=weights_only is not False,
            **kwargs,
        )

    def configure_model(self) -> None:
        """Shard the decoder where the strategy shards, then compile its blocks; each once."""
        if self._trainer is not None:
            strategies.check_strategy(self._trainer)
        if self.device_mesh is not None:
            strategies.shard(self.decoder, self.device_mesh["data_parallel"])
        if self.compile_blocks:
            # einops adds a type of tensors that is new to it to a dict whose length graphs check:
            # the first graph of a process would fit once, and each block be compiled twice.
            rearrange(torch.empty(1), "a -> a")
            for block in self.decoder.blocks:
                # What `compile` sets is lost in a deep copy, as weight averaging makes one, and in
                # a spawned process; a second `compile` of the same block would compile again.
                if block._compiled_call_impl is None:
                    block.compile()

    def forward(self, tokens: Tensor, plan: SelectionPlan | None = None) -> decoder.DecoderOutput:
        """Logits and routings of token sequences.

        Args:
            tokens: token ids `[B, T]`, below V.
            plan: the experts that run; None runs those of training, by default all.

        Returns:
            Logits `[B, T, V]` and the routing of every layer.
        """
        output: decoder.DecoderOutput = self.decoder(tokens, self.plan if plan is None else plan)
        return output

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Total loss of a batch; logs its terms."""
        group = strategies.data_parallel_group(self.device_mesh)
        plan, dense = self._running_plan(), SelectionPlan()
        step = Step.of(self, batch, plan, group)
        if self.consistency_weight and plan != dense:
            with run_plan(self, dense):
                dense_step = Step.of(self, batch, dense, group)
            total, terms = consistent_objective(
                step, dense_step, self.routing_loss, self.consistency_weight, group
            )
        else:
            total, terms = objective(step, self.routing_loss, group)
        if not torch.isfinite(total):
            listed = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
            raise FloatingPointError(
                f"the loss is {total.item()} at step {self.global_step}, batch {batch_idx} "
                f"(language model {step.loss.item()}, {listed}); no step was taken"
            )
        self.log("train/loss", step.loss, prog_bar=True)
        if self._logs_are_due():
            self.log_dict({f"train/{name}": value for name, value in terms.items()})
        return {"loss": total, **step.results()}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Language-model loss of a validation batch."""
        return self._evaluate(batch, self.val_loss, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Language-model loss of a test batch."""
        return self._evaluate(batch, self.test_loss, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Negative log-likelihood of each token in nats, `[B, T]`, 0 where labels are ignored."""
        logits_BTV = self(batch["input_ids"]).logits
        return F.cross_entropy(logits_BTV.mT.float(), batch["labels"], reduction="none")

    def _evaluate(self, batch: Batch, metric: EvaluationLoss, split: str) -> dict[str, Any]:
        step = Step.of(self, batch, self._running_plan())
        count = step.mask_BT.sum()
        metric.update(step.loss, count)
        _, terms = objective(step, self.routing_loss)
        terms = {f"{split}/{name}": value for name, value in terms.items()}
        self.log_dict(terms, batch_size=max(1, int(count)), sync_dist=True)
        return {"loss": step.loss, **step.results()}

    def _running_plan(self) -> SelectionPlan:
        return running_plan(self, self.plan)


def _one_for_all(given: list[Factory] | Factory) -> list[Factory] | Factory:
    """A list of one as its factory: the command line makes one where it changes a single option."""
    return given[0] if isinstance(given, list) and len(given) == 1 else given
