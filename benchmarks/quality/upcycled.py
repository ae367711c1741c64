"""Runs of `upcycling.py`: dense Llamas of transformers, and what upcycling makes of them.

Shapes: B windows in a batch, T positions, V vocabulary.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_dsmoe import (
    RoutingLoss,
    SelectionPlan,
    TopK,
    record_routings,
    run_plan,
    upcycle,
)
from lightning_dsmoe.schedules import LinearWarmupCosine

Batch = tuple[Tensor, Tensor]
"""Tokens and the ones that follow them, `[B, T]`."""
Split = Literal["contiguous", "weights", "activations"]
Loss = Callable[[LlamaForCausalLM, Batch, int], Tensor]
"""Of a batch in a step."""

CONTEXT, BATCH_SIZE = 64, 12
TRAIN, VALIDATION = 0.9, 0.95
"""Where the training text and the validation text end; the rest is the test text."""
LEARNING_RATE = {"dense": 1e-3, "longer": 3e-4, "upcycled": 7e-4}
"""Peaks. What is best for an upcycled model is too much for the dense one that goes on training."""
MI_WEIGHT, LIKENESS = 0.01, 10.0
"""Weights of the losses of an upcycled model beside the one against the dense model's predictions:
of mutual information, and of the distance of what each layer gives from the dense model's."""
SAMPLE = 64
"""Windows of the training text that neurons are split by."""


class Size(NamedTuple):
    """A Llama of transformers and its training.

    Args:
        d_model: width of the tokens.
        n_layers: number of layers.
        d_hidden: hidden units of each feed-forward layer.
        n_heads: query heads, of one KV head.
        steps: optimizer steps of the dense model; a tenth as many follow.
        n_experts: experts of each upcycled feed-forward layer.
        top: numbers of experts that run by turns in the training of the upcycled model.
    """

    d_model: int
    n_layers: int
    d_hidden: int
    n_heads: int
    steps: int
    n_experts: int
    top: tuple[int, ...]


SIZES = {
    "0.8M": Size(96, 4, 640, n_heads=6, steps=2000, n_experts=64, top=(8, 19)),
    "4.4M": Size(192, 6, 1152, n_heads=12, steps=1000, n_experts=72, top=(11, 23)),
}


def llama(size: Size, vocab_size: int) -> LlamaForCausalLM:
    """A dense model without training."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=size.d_model,
            intermediate_size=size.d_hidden,
            num_hidden_layers=size.n_layers,
            num_attention_heads=size.n_heads,
            num_key_value_heads=1,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def encoded(path: Path) -> Tensor:
    """The characters of a text as numbers in the order of the alphabet."""
    text = path.read_text(encoding="utf-8")
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    return torch.tensor([numbers[character] for character in text])


def random_windows(text: Tensor, n_windows: int, generator: torch.Generator) -> Tensor:
    """Windows of the training text, one token longer than the context."""
    windows = text[: int(TRAIN * len(text))].unfold(0, CONTEXT + 1, 1)
    return windows[torch.randint(len(windows), (n_windows,), generator=generator)]


def held_out(text: Tensor, split: str, batch_size: int = 64) -> list[Batch]:
    """The windows of the "validation" or the "test" text, one after the other."""
    begin, end = (TRAIN, VALIDATION) if split == "validation" else (VALIDATION, 1.0)
    part = text[int(begin * len(text)) : int(end * len(text))]
    windows = part.unfold(0, CONTEXT + 1, CONTEXT)
    return [(each[:, :-1], each[:, 1:]) for each in windows.split(batch_size)]


def train(
    model: LlamaForCausalLM, text: Tensor, steps: int, *, rate: float, seed: int, loss: Loss
) -> None:
    """Train as `cli_configs/shakespeare_nano.yaml` does: one warm-up and a cosine."""
    optimizer = torch.optim.AdamW(
        model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    schedule = LinearWarmupCosine(optimizer, steps, warmup_steps=min(100, steps // 10))
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        chosen = random_windows(text, BATCH_SIZE, generator)
        loss(model, (chosen[:, :-1], chosen[:, 1:]), step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def cross_entropy(model: LlamaForCausalLM, batch: Batch, step: int = 0) -> Tensor:
    """The mean loss of a batch, in nats per character."""
    return window_losses(model, batch).mean()


def window_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of each window `[B]`, in nats per character."""
    tokens_BT, labels_BT = batch
    logits_BTV = model(tokens_BT, use_cache=False).logits
    losses = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="none")
    return losses.view_as(labels_BT).mean(1)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, batches: list[Batch]) -> float:
    """The loss on held-out text, in nats per character."""
    return torch.cat([window_losses(model, batch) for batch in batches]).mean().item()


def upcycled(model: LlamaForCausalLM, text: Tensor, size: Size, *, split: Split, seed: int) -> None:
    """Make mixtures of a dense model, in place, and train them to do as it did.

    Each step runs one of the plans, and its loss is

    L = KL(p_dense || p) + lambda mean_l |x_l - x_l,dense|^2 / var(x_l,dense) + alpha L_MI,

    with p the predictions and x_l what layer l gives.
    """
    dense = copy.deepcopy(model)
    tokens = random_windows(text, SAMPLE, torch.Generator().manual_seed(seed))[:, :-1]
    upcycle(model, size.n_experts, split=split, tokens=tokens, router="activations")
    plans = [SelectionPlan(experts=TopK(k)) for k in size.top]
    routing_loss = RoutingLoss(expert_mi=MI_WEIGHT)

    def loss(model: LlamaForCausalLM, batch: Batch, step: int) -> Tensor:
        with run_plan(model, plans[step % len(plans)]), record_routings(model) as record:
            own = model(batch[0], use_cache=False, output_hidden_states=True)
        with torch.no_grad():
            wanted = dense(batch[0], use_cache=False, output_hidden_states=True)
        log_p, log_q = (each.logits.flatten(0, 1).log_softmax(-1) for each in (own, wanted))
        divergence = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
        layers = list(zip(own.hidden_states[1:], wanted.hidden_states[1:], strict=True))
        distances = [(x - target).square().mean() / target.var() for x, target in layers]
        return divergence + LIKENESS * sum(distances) / len(layers) + routing_loss(record)

    train(
        model,
        text,
        size.steps // 10,
        rate=LEARNING_RATE["upcycled"],
        seed=seed,
        loss=loss,
    )
