"""A plain dense Llama and its training in two pages of torch, written for clarity from the papers.

The reference of every layout and of the trainer: nothing here knows of ranks, micro-batches or ``argonne``'s layers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from argonne.models import ArgonneConfig


def logits(weights: dict[str, Tensor], config: ArgonneConfig, ids: Tensor, documents: Tensor | None = None) -> Tensor:
    """``[batch, sequence]`` ids -> ``[batch, sequence, vocabulary]``, in the dtype of the weights.

    ``documents``, of the shape of ``ids``: a position attends to none but its own.
    """
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        w = {k.removeprefix(f"model.layers.{layer}."): v for k, v in weights.items() if f".{layer}." in k}
        x = x + attention(w, config, norm(x, w["input_layernorm.weight"], config.rms_norm_eps), documents)
        h = norm(x, w["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = h @ w["mlp.gate_proj.weight"].T, h @ w["mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w["mlp.down_proj.weight"].T
    x = norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    return x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def loss(
    weights: dict[str, Tensor],
    config: ArgonneConfig,
    ids: Tensor,
    targets: Tensor,
    documents: Tensor | None = None,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The mean over positions of the cross-entropy with the target, or with a target of which a share is spread evenly
    over the vocabulary, and of ``z_loss`` times the squared logarithm of the softmax's denominator."""
    scores = logits(weights, config, ids, documents)
    total = scores.logsumexp(-1, keepdim=True)
    scores = scores - total
    target = scores.gather(-1, targets[..., None])[..., 0]
    losses = -(1 - smoothing) * target - smoothing * scores.mean(-1) if smoothing else -target
    return (losses + z_loss * total[..., 0] ** 2).mean() if z_loss else losses.mean()


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def attention(w: dict[str, Tensor], config: ArgonneConfig, x: Tensor, documents: Tensor | None = None) -> Tensor:
    batch, length, _ = x.shape
    dim, heads = config.head_dim, config.num_attention_heads
    q, k, v = (
        (x @ w[f"self_attn.{name}_proj.weight"].T).view(batch, length, -1, dim).transpose(1, 2) for name in "qkv"
    )
    q, k = rotate(q, config.rope_theta), rotate(k, config.rope_theta)
    group = heads // config.num_key_value_heads
    unseen = torch.ones(length, length, dtype=torch.bool).triu(1)
    if documents is not None:
        unseen = unseen | (documents[:, :, None] != documents[:, None, :])
    out = []
    for head in range(heads):
        scores = q[:, head] @ k[:, head // group].transpose(1, 2) / dim**0.5
        out.append(scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v[:, head // group])
    return torch.cat(out, dim=-1) @ w["self_attn.o_proj.weight"].T


def rotate(x: Tensor, theta: float) -> Tensor:
    """Each pair (i, i + dim/2) as a complex number, turned by position * theta^(-2i/dim)."""
    length, dim = x.shape[-2:]
    speed = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turn = torch.polar(torch.ones(length, dim // 2, dtype=torch.float64), torch.arange(length)[:, None] * speed)
    pairs = torch.complex(x[..., : dim // 2].double(), x[..., dim // 2 :].double()) * turn
    return torch.cat((pairs.real, pairs.imag), dim=-1).to(x.dtype)


@dataclass(frozen=True)
class Recipe:
    """What the flags say of loss and optimizer; ``total`` steps make the schedule, however many are taken."""

    peak: float
    minimum: float
    warmup: int
    total: int
    decay: float
    clip: float
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    smoothing: float = 0.0
    z_loss: float = 0.0
    falling: int = 0
    """If there are any, the rate stays at its peak up to these last steps, and then falls in a line."""

    def rate(self, step: int) -> float:
        """Up from the minimum in a line, down to it along half a cosine or late; steps count from 1."""
        if step <= self.warmup:
            return self.minimum + (self.peak - self.minimum) * step / self.warmup
        if self.falling:
            left = min(self.falling, self.total - step)
            return self.minimum + (self.peak - self.minimum) * left / self.falling
        turn = math.pi * (step - self.warmup) / (self.total - self.warmup)
        return self.minimum + (self.peak - self.minimum) * (math.cos(turn) + 1) / 2


@dataclass
class Run:
    """A run in one piece: its weights and moments by their names, and what it tells of every step."""

    weights: dict[str, Tensor]
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def train(
        self,
        config: ArgonneConfig,
        recipe: Recipe,
        batches: Iterable[tuple[Tensor, Tensor | None]],
        overflows: Collection[int] = (),
    ) -> None:
        """A step for each ``[sequences, length + 1]`` of ids (with documents' numbers, or None); float64 throughout.

        A step whose number is in ``overflows`` is counted, and leaves weights and moments alone.
        """
        for ids, documents in batches:
            leaves = {name: weight.clone().requires_grad_() for name, weight in self.weights.items()}
            own = None if documents is None else documents[:, :-1]
            value = loss(leaves, config, ids[:, :-1], ids[:, 1:], own, recipe.smoothing, recipe.z_loss)
            value.backward()
            norm = torch.cat([leaf.grad.flatten() for leaf in leaves.values()]).norm().item()
            step = len(self.losses) + 1
            self.losses.append(value.item())
            self.norms.append(norm)
            self.rates.append(recipe.rate(step))
            if step not in overflows:
                factor = min(1.0, recipe.clip / (norm + 1e-6))  # 1e-6: torch.nn.utils.clip_grad_norm_'s
                gradients = {name: leaf.grad * factor for name, leaf in leaves.items()}
                self.update(gradients, recipe.rate(step), recipe.decay, recipe.betas, recipe.epsilon)

    def update(
        self,
        gradients: dict[str, Tensor],
        rate: float,
        decay: float,
        betas: tuple[float, float] = (0.9, 0.95),
        epsilon: float = 1e-8,
    ) -> None:
        """AdamW (arXiv 1711.05101, algorithm 2): decay on matrices alone."""
        (one, two), self.updates = betas, self.updates + 1
        for name, gradient in gradients.items():
            weight, zero = self.weights[name], torch.zeros_like(gradient)
            m = self.first[name] = one * self.first.get(name, zero) + (1 - one) * gradient
            v = self.second[name] = two * self.second.get(name, zero) + (1 - two) * gradient**2
            direction = m / (1 - one**self.updates) / ((v / (1 - two**self.updates)).sqrt() + epsilon)
            self.weights[name] = weight - rate * (direction + (decay * weight if weight.ndim == 2 else 0))
