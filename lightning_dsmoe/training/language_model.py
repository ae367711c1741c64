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
from lightning_dsmoe.inference.text import Prompts
from lightning_dsmoe.losses import RoutingLoss
from lightning_dsmoe.moved import renamed_attributes
from lightning_dsmoe.routing import AllExperts, Selection, SelectionPlan, run_plan
from lightning_dsmoe.routing.running import running_plan
from lightning_dsmoe.serialization.checkpoint import TEXT_FIELDS
from lightning_dsmoe.training import checkpoints, continuation, strategies
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
        log_layers: log the mutual information of each router in training, beside the means.
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
        >>> model.generate(tokens, 3, temperature=0).shape
        torch.Size([2, 9])
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
        log_layers: bool = False,
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
        self.compile_blocks, self.log_layers = compile_blocks, log_layers
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
        self._loaded: dict[str, Any] = {}

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
            **kwargs: arguments of the model in place of those in the file. A model built in Python
                gets its layers from the file's description; its optimizer and schedule, which the
                file does not hold, are the defaults unless they are given here.

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
        """Compile the blocks, then shard the decoder where the strategy shards; each once.

        As in PyTorch's own recipes: recomputation of activations, then compilation, then sharding.
        A block is compiled in place, so it is one graph with what gathers its weights around it.
        """
        if self._trainer is not None:
            strategies.check_strategy(self._trainer)
        if self.compile_blocks:
            # einops adds a type of tensors that is new to it to a dict whose length graphs check:
            # the first graph of a process would fit once, and each block be compiled twice.
            rearrange(torch.empty(1), "a -> a")
            for block in self.decoder.blocks:
                # What `compile` sets is lost in a deep copy, as weight averaging makes one, and in
                # a spawned process; a second `compile` of the same block would compile again.
                if block._compiled_call_impl is None:
                    block.compile()
        if self.device_mesh is not None:
            policy = strategies.precision_policy(self.trainer)
            strategies.shard(self.decoder, self.device_mesh["data_parallel"], policy)
            strategies.check_sharded(self)

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

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int = 200,
        plan: SelectionPlan | None = None,
        **options: Any,
    ) -> str | list[str] | Tensor:
        """Continue prompts with the model as it is: text gives text, and tokens give tokens.

        Nothing is compiled or packed; what `compile_sparse` makes of the model is faster. The
        tokenizer and the context length are those of the data module, or of the checkpoint that
        the model was loaded from.

        Args:
            prompts: a text, or texts of any lengths; or tokens `[T]` or `[B, T]`.
            max_new_tokens: most tokens to add.
            plan: the experts that run; None runs those of training, by default all.
            options: those of `lightning_dsmoe.inference.generate`, such as `temperature` (1 unless
                given) and `top_p`; with texts, `stop` is one text or several.

        Returns:
            Prompts and continuations, in the form of the prompts.

        Raises:
            ValueError: if a prompt is empty or longer than the context, an option is out of range,
                the plan does not match the model, or there is a text but no tokenizer.
            TypeError: if there is no such option.
        """
        options = {"plan": self.plan if plan is None else plan, **options}
        return continuation.continue_with(
            self, self.decoder, self._loaded, prompts, max_new_tokens, options
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check a checkpoint, and note what `fit` resumes with and `generate` reads."""
        super().on_load_checkpoint(checkpoint)
        self._loaded = {name: checkpoint.get(name) for name in TEXT_FIELDS}

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Total loss of a batch; logs its terms."""
        group = strategies.data_parallel_group(self.device_mesh)
        plan, dense = self._running_plan(), SelectionPlan()
        step = Step.of(self, batch, plan, group)
        logged, weight = self._logs_are_due(), self.consistency_weight
        by_layer = self.log_layers and logged
        if weight and plan != dense:
            with run_plan(self, dense):
                dense_step = Step.of(self, batch, dense, group)
            total, terms = consistent_objective(
                step, dense_step, self.routing_loss, weight, group, by_layer=by_layer
            )
        else:
            total, terms = objective(step, self.routing_loss, group, by_layer=by_layer)
        self._step_losses.add(batch_idx, batch, total, {"language model": step.loss, **terms})
        self.log("train/loss", step.loss, prog_bar=True)
        if logged:
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
