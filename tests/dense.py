"""A plain dense Llama in a page of torch, written for clarity from the papers: the reference of every layout."""

from __future__ import annotations

import torch
from torch import Tensor

from argonne.models import ArgonneConfig


def logits(weights: dict[str, Tensor], config: ArgonneConfig, ids: Tensor) -> Tensor:
    """``[batch, sequence]`` ids -> ``[batch, sequence, vocabulary]``, in the dtype of the weights."""
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        w = {k.removeprefix(f"model.layers.{layer}."): v for k, v in weights.items() if f".{layer}." in k}
        x = x + attention(w, config, norm(x, w["input_layernorm.weight"], config.rms_norm_eps))
        h = norm(x, w["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = h @ w["mlp.gate_proj.weight"].T, h @ w["mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w["mlp.down_proj.weight"].T
    x = norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    return x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def loss(weights: dict[str, Tensor], config: ArgonneConfig, ids: Tensor, targets: Tensor) -> Tensor:
    """The mean over positions of -log softmax at the target."""
    scores = logits(weights, config, ids)
    scores = scores - scores.logsumexp(-1, keepdim=True)
    return -scores.gather(-1, targets[..., None]).mean()


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def attention(w: dict[str, Tensor], config: ArgonneConfig, x: Tensor) -> Tensor:
    batch, length, _ = x.shape
    dim, heads = config.head_dim, config.num_attention_heads
    q, k, v = (
        (x @ w[f"self_attn.{name}_proj.weight"].T).view(batch, length, -1, dim).transpose(1, 2) for name in "qkv"
    )
    q, k = rotate(q, config.rope_theta), rotate(k, config.rope_theta)
    group = heads // config.num_key_value_heads
    out = []
    for head in range(heads):
        scores = q[:, head] @ k[:, head // group].transpose(1, 2) / dim**0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        out.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, head // group])
    return torch.cat(out, dim=-1) @ w["self_attn.o_proj.weight"].T


def rotate(x: Tensor, theta: float) -> Tensor:
    """Each pair (i, i + dim/2) as a complex number, turned by position * theta^(-2i/dim)."""
    length, dim = x.shape[-2:]
    speed = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turn = torch.polar(torch.ones(length, dim // 2, dtype=torch.float64), torch.arange(length)[:, None] * speed)
    pairs = torch.complex(x[..., : dim // 2].double(), x[..., dim // 2 :].double()) * turn
    return torch.cat((pairs.real, pairs.imag), dim=-1).to(x.dtype)
