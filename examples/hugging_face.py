"""A Llama of transformers whose feed-forward layers are mixtures of experts.

    python examples/hugging_face.py

The Trainer of transformers, or Lightning, trains it with every expert; afterwards `generate` runs
as few experts as a plan says. The code of the model is not touched.
"""

import inspect
import random
import tempfile
import textwrap
from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from lightning import Trainer as LightningTrainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lightning_dsmoe import (
    GLUExperts,
    MixtureOfExperts,
    OutputOnly,
    RoutingLoss,
    SelectionPlan,
    TopK,
    record_routings,
    run_plan,
)

WIDTH, LAYERS, EXPERTS, D_EXPERT = 64, 2, 8, 24
CONTEXT, BATCH_SIZE, LEARNING_RATE = 64, 16, 3e-3
PLANS = {
    "all 8 experts": SelectionPlan(),
    "the best 3 of each byte": SelectionPlan(experts=TopK(3)),
}
Example = dict[str, Tensor]


# The model: each `mlp` becomes a mixture of the same total width.


def llama() -> LlamaForCausalLM:
    """A small Llama over bytes."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=EXPERTS * D_EXPERT,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    experts = partial(GLUExperts, activation="silu")  # what Llama's own `mlp` is one of
    for layer in model.model.layers:
        layer.mlp = OutputOnly(MixtureOfExperts(WIDTH, EXPERTS, D_EXPERT, experts=experts))
    return model


# Text that is always there: two modules of the standard library, in pieces of different lengths.


def text() -> list[Example]:
    """The pieces in a random order, each as far as it fits the context."""
    sources = [inspect.getsource(module).encode() for module in (random, textwrap)]
    pieces = [piece[:CONTEXT] for source in sources for piece in source.split(b"\n\n") if piece]
    random.Random(1).shuffle(pieces)
    return [padded(piece) for piece in pieces]


def padded(piece: bytes) -> Example:
    """Bytes as tokens; what follows them has no label, and nobody attends to it."""
    rest = CONTEXT - len(piece)
    return {
        "input_ids": torch.tensor([*piece] + [0] * rest),
        "attention_mask": torch.tensor([1] * len(piece) + [0] * rest),
        "labels": torch.tensor([*piece] + [-100] * rest),
    }


# Training by transformers.


class MixtureTrainer(Trainer):
    """The Trainer of transformers, which adds the losses of the routers."""

    routing_loss = RoutingLoss(expert_mi=0.02)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Example,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss, and in training that of its routers over all bytes."""
        with record_routings(model, mask=inputs["attention_mask"].bool()) as record:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            loss = loss + self.routing_loss(record) / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


def train_by_transformers(model: LlamaForCausalLM, train: list[Example], steps: int) -> None:
    """Train with activation checkpointing: what is computed again is not recorded again."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": False},  # routers need gradients
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        MixtureTrainer(model, arguments, train_dataset=train).train()


# The same by Lightning.


class LlamaModule(LightningModule):
    """The same losses in a LightningModule."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.routing_loss = RoutingLoss(expert_mi=0.02)

    def training_step(self, batch: Example, batch_idx: int) -> Tensor:
        with record_routings(self.model, mask=batch["attention_mask"].bool()) as record:
            loss: Tensor = self.model(**batch).loss
        return loss + self.routing_loss(record)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), LEARNING_RATE, weight_decay=0.0)


def train_by_lightning(model: LlamaForCausalLM, train: list[Example], steps: int) -> None:
    """Train for some steps."""
    model.train()
    trainer = LightningTrainer(
        max_steps=steps,
        gradient_clip_val=1.0,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LlamaModule(model), DataLoader(train, BATCH_SIZE, shuffle=True))


# What a plan leaves of it.


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, pieces: list[Example], plan: SelectionPlan) -> float:
    """Nats per byte under a plan."""
    model.eval()
    batch = {name: torch.stack([piece[name] for piece in pieces]) for name in pieces[0]}
    with run_plan(model, plan):
        return float(model(**batch).loss)


def continuation(model: LlamaForCausalLM, prompt: bytes, plan: SelectionPlan, n_bytes: int) -> str:
    """The most probable text after a prompt under a plan, by `generate` of transformers."""
    model.eval()
    tokens = torch.tensor([[*prompt]])
    with run_plan(model, plan):
        all_tokens = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=n_bytes,
            do_sample=False,
        )
    return bytes(all_tokens[0].tolist()).decode(errors="replace")


def main() -> None:
    """Train by both, and compare plans."""
    pieces = text()
    held_out, train = pieces[:64], pieces[64:]
    trained_by = {"transformers": train_by_transformers, "Lightning": train_by_lightning}
    for name, trained in trained_by.items():
        torch.manual_seed(1)
        model = llama()
        trained(model, train, steps=200)
        print(f"Trained by {name}:")
        for words, plan in PLANS.items():
            print(f"  {words}: {held_out_loss(model, held_out, plan):.3f} nats per byte")
            print(f"    {continuation(model, b'    def ', plan, 40)!r}")


if __name__ == "__main__":
    main()
