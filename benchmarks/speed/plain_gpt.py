"""A plain GPT and a plain training loop, the yardstick of `training.py`.

Nothing of `lightning_dsmoe` is used: LayerNorm, multi-head attention with one projection for
queries, keys and values, a GELU network four times as wide, learned positions, a tied head.

Shapes: B batch, T tokens, D width, H heads, C head width.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainBlock(nn.Module):
    """Attention and a two-layer network, each after a LayerNorm and with a residual."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_1 = nn.LayerNorm(d_model, bias=False)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.norm_2 = nn.LayerNorm(d_model, bias=False)
        self.up = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Transform tokens."""
        qkv = self.qkv(self.norm_1(x_BTD)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in qkv)
        heads_BHTC = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(heads_BHTC.transpose(1, 2).flatten(2))
        return x_BTD + self.down(F.gelu(self.up(self.norm_2(x_BTD))))


class PlainGPT(nn.Module):
    """Embeddings, blocks, a norm and a head that shares the weights of the embeddings."""

    def __init__(
        self, vocab_size: int, d_model: int, n_layers: int, n_heads: int, context: int
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.positions = nn.Embedding(context, d_model)
        self.blocks = nn.Sequential(*(PlainBlock(d_model, n_heads) for _ in range(n_layers)))
        self.norm = nn.LayerNorm(d_model, bias=False)
        for weight in (self.tokens.weight, self.positions.weight):
            nn.init.normal_(weight, std=0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits of the token after each token."""
        positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.blocks(self.tokens(tokens_BT) + self.positions(positions))
        return F.linear(self.norm(x_BTD), self.tokens.weight)


def windows(text: Tensor, batch_size: int, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of random windows of a text, and the tokens that follow each token."""
    while True:
        starts = torch.randint(len(text) - context, (batch_size,)).tolist()
        rows = torch.stack([text[at : at + context + 1] for at in starts]).long()
        yield rows[:, :-1], rows[:, 1:]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of every side."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    *,
    clip: float = 1.0,
) -> None:
    """One step: loss, backward, clipping, optimizer."""
    optimizer.zero_grad(set_to_none=True)
    loss().backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
