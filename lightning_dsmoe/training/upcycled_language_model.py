"""Upcycled causal models of transformers as a LightningModule.

Shapes: B sequences, T positions, V vocabulary.
"""

from pathlib import Path
from typing import IO, Any, Literal, Self

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_dsmoe.data.loader import Batch
from lightning_dsmoe.data.windows import IGNORED
from lightning_dsmoe.losses import RoutingLoss
from lightning_dsmoe.routing import record_routings
from lightning_dsmoe.serialization.checkpoint import check_state, read_checkpoint
from lightning_dsmoe.tokenizers import load_tokenizer
from lightning_dsmoe.training import checkpoints, strategies
from lightning_dsmoe.training.evaluation_loss import EvaluationLoss
from lightning_dsmoe.training.objective import mean_cross_entropy
from lightning_dsmoe.training.resumable_module import ResumableModule
from lightning_dsmoe.upcycling import save_upcycled, upcycle
from lightning_dsmoe.upcycling.directory import check_free, is_upcycled
from lightning_dsmoe.upcycling.source import load_source

_FROM_CHECKPOINTS = (
    "directory",
    "n_experts",
    "split",
    "expert_mi_weight",
    "load_balancing_weight",
    "router_z_weight",
)
"""Arguments that a checkpoint may give; whether code is run is not for a file to say."""


class UpcycledLanguageModel(ResumableModule):
    """A causal model of transformers whose feed-forward layers are mixtures, trained densely.

    L = L_LM + sum over routers of (alpha L_MI + beta L_balance + gamma L_z)

    Weights are float32 whatever type their file has, unless the precision of the Trainer says
    otherwise (`bf16-true`), and are written as they were trained. A run that was interrupted goes
    on as if it had not been, from a checkpoint of one process or of DDP; strategies that shard are
    not supported.

    Args:
        directory: an upcycled model, or a dense one with `n_experts`: config.json and safetensors.
        n_experts: number of experts of each layer of a dense model; None for an upcycled one.
        split: how the neurons of a dense model are shared out, see `upcycle`; for activations, run
            `lightning-dsmoe upcycle` first.
        output: directory to which `fit` writes the trained model; None for checkpoints alone.
        vocab_size: vocabulary of the data, which the command line fills in; the model's must not be
            smaller.
        expert_mi_weight: alpha, weight of the MI loss of each router.
        load_balancing_weight: beta, weight of the load-balancing loss of each router.
        router_z_weight: gamma, weight of the z-loss of each router.
        trust_remote_code: run the code that the model's configuration names.
        log_layers: log the mutual information of each router in training, beside the means.
        optimizer: factory of the optimizer, called with parameter groups.
        lr_scheduler: factory of a learning-rate schedule, stepped after every optimizer step.

    Raises:
        FileNotFoundError: if a file is missing.
        FileExistsError: if something else than an upcycled model is at `output`.
        ValueError: if a file or layer is not what it should be, or the vocabulary does not fit.

    Examples:
        >>> from lightning_dsmoe import TextDataModule, UpcycledLanguageModel
        >>> model = UpcycledLanguageModel("llama", n_experts=16)  # doctest: +SKIP
        >>> data = TextDataModule("my.txt", tokenizer="llama/tokenizer.json")  # doctest: +SKIP
        >>> lightning.Trainer(max_steps=100).fit(model, data)  # doctest: +SKIP
        >>> model.save("trained")  # doctest: +SKIP
    """

    def __init__(
        self,
        directory: str,
        n_experts: int | None = None,
        *,
        split: Literal["contiguous", "weights"] = "contiguous",
        output: str | None = None,
        vocab_size: int | None = None,
        expert_mi_weight: float = 0.02,
        load_balancing_weight: float = 0.0,
        router_z_weight: float = 0.0,
        trust_remote_code: bool = False,
        log_layers: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.save_hyperparameters()
        checkpoints.drop_objects(self.hparams)
        self.routing_loss = RoutingLoss(
            expert_mi_weight, 0.0, load_balancing_weight, router_z_weight
        )
        if is_upcycled(Path(directory)) != (n_experts is None):
            raise ValueError(
                f"n_experts is for a dense model, and needed there; {directory} with "
                f"n_experts={n_experts}"
            )
        if output is not None:
            check_free(Path(output))
        self.directory, self.output, self.log_layers = directory, output, log_layers
        # AdamW would round most of its steps away in the bfloat16 of most files.
        self.model = load_source(directory, trust_remote_code=trust_remote_code).float()
        self.vocab_size: int = self.model.get_input_embeddings().weight.shape[0]
        if vocab_size is not None and vocab_size > self.vocab_size:
            raise ValueError(
                f"the data's tokenizer has {vocab_size} tokens, the model of {directory} only "
                f"{self.vocab_size}"
            )
        if n_experts is not None:
            upcycle(self.model, n_experts, split=split)
        self.model.train()

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
        """Rebuild a model from a checkpoint file and the directory that it was made of.

        Args:
            checkpoint_path: the file, or one that is open, at its beginning.
            map_location: device of the model; None for the CPU.
            hparams_file: not used; give arguments instead.
            strict: not used; the names and shapes of all weights are checked.
            weights_only: refuse files that hold more than data. False trusts the file fully.
            **kwargs: arguments of the model in place of those in the file, such as `directory`, if
                it has moved.

        Raises:
            FileNotFoundError: if there is no such file, or a file of the directory is missing.
            ValueError: if the file is not a checkpoint of this class or is of another model.
        """
        checkpoint = read_checkpoint(checkpoint_path, weights_only=weights_only is not False)
        given = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {})
        options = {name: given[name] for name in _FROM_CHECKPOINTS if name in given} | kwargs
        if not isinstance(options.get("directory"), str | Path):
            raise ValueError(f"{checkpoint_path} is no checkpoint of a {cls.__name__}")
        model = cls(**options)
        check_state(model.state_dict(), checkpoint["state_dict"])
        model.load_state_dict(checkpoint["state_dict"])
        return model if map_location is None else model.to(map_location)

    def setup(self, stage: str) -> None:
        """Prepare a run, and refuse text of another tokenizer than the model's."""
        super().setup(stage)
        path = Path(self.directory, "tokenizer.json")
        given = getattr(getattr(self._trainer, "datamodule", None), "tokenizer", None)
        if given is None or not path.is_file():
            return
        if given.fingerprint() != load_tokenizer(path).fingerprint():
            raise ValueError(
                f"the data's tokenizer is not that of the model: use tokenizer={str(path)!r}"
            )

    def configure_model(self) -> None:
        """Refuse strategies that shard, or that train otherwise than one process does."""
        if self._trainer is not None:
            strategies.check_strategy(self._trainer)
        if self.device_mesh is not None:
            raise ValueError(
                f"{type(self).__name__} cannot be sharded; use one device or DDPStrategy"
            )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[B, T, V]` of token ids `[B, T]`."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Total loss of a batch; logs its terms."""
        group = strategies.data_parallel_group(None)
        mask_BT = batch["labels"] != IGNORED
        with record_routings(self.model, mask=mask_BT) as record:
            loss = mean_cross_entropy(self(batch["input_ids"]), batch["labels"], group)
        logged = self._logs_are_due()
        by_layer = self.log_layers and logged
        routing_loss, terms = self.routing_loss.losses(record, group=group, by_layer=by_layer)
        total = loss + routing_loss
        self._step_losses.add(batch_idx, batch, total, {"language model": loss, **terms})
        self.log("train/loss", loss, prog_bar=True)
        if logged:
            self.log_dict({f"train/{name}": value for name, value in terms.items()})
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Language-model loss of a validation batch."""
        return self._evaluate(batch, self.val_loss)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Language-model loss of a test batch."""
        return self._evaluate(batch, self.test_loss)

    def on_fit_end(self) -> None:
        """Write the trained model, if it has a place."""
        if self.output is not None and self.trainer.is_global_zero:
            self.save(self.output)

    def save(self, directory: str | Path) -> None:
        """Write the model as `load_upcycled` reads it, with the tokenizer of its source.

        Args:
            directory: where to write; an earlier upcycled model there is replaced.
        """
        save_upcycled(self.model, directory, tokenizer_from=self.directory)

    def _evaluate(self, batch: Batch, metric: EvaluationLoss) -> Tensor:
        loss = mean_cross_entropy(self(batch["input_ids"]), batch["labels"])
        metric.update(loss, (batch["labels"] != IGNORED).sum())
        return loss
