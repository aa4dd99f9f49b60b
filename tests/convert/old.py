"""The original's files, made here: each of the forms in which users hold them, with random weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from argonne.models import ArgonneConfig

SHAPE = ArgonneConfig(24, 3, 6, 3, 50, 40, max_position_embeddings=32, tie_word_embeddings=False)
TIED = ArgonneConfig(24, 3, 6, 3, 50, 40, max_position_embeddings=32)
TOLD = {"num_attention_heads": 6, "block_size": 32}
"""What the tensors of these do not show, in the original's words."""

State = dict[str, Tensor]


def argonne2(config: ArgonneConfig = TIED, seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    """A state dict of 2.x, the head in it even where it is the embedding."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).mul(0.3).to(dtype)

    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    state = {"embed_tokens.weight": random(config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes = {
            **{"attn.q_proj": (query, hidden), "attn.k_proj": (key, hidden), "attn.v_proj": (key, hidden)},
            **{"attn.o_proj": (hidden, query), "input_norm": (hidden,), "post_norm": (hidden,)},
            **{"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)},
        }
        state |= {f"blocks.{layer}.{name}.weight": random(*shape) for name, shape in shapes.items()}
    state["norm.weight"] = random(hidden)
    state["lm_head.weight"] = (
        state["embed_tokens.weight"] if config.tie_word_embeddings else random(config.vocab_size, hidden)
    )
    return state


def as_llama(state: State) -> State:
    """The same tensors as Llama names them: written out once more, so that a slip in the library's table shows."""
    changed = {"attn.": "self_attn.", "input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
    named = {}
    for name, tensor in state.items():
        for old, new in changed.items():
            name = name.replace(f".{old}", f".{new}")
        name = name.replace("blocks.", "model.layers.") if name.startswith("blocks.") else name
        named[f"model.{name}" if name.startswith(("embed", "norm")) else name] = tensor
    return named


def shards(state: State, ranks: int) -> list[State]:
    """What each of so many tensor-parallel ranks of the original had."""
    parts: list[State] = [{} for _ in range(ranks)]
    for name, tensor in state.items():
        dim = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0 if "_proj" in name else None
        for rank, part in enumerate(parts):
            part[name] = tensor.clone() if dim is None else tensor.chunk(ranks, dim)[rank].clone()
    return parts


def in_stages(state: State, per_stage: int, keep: bool = False) -> State:
    """The blocks by pipeline stage; with ``keep`` under their plain names as well, as 1.x had them."""
    found = dict(state) if keep else {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")}
    for name, tensor in state.items():
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            found[f"pipeline_stages.{int(layer) // per_stage}.{int(layer) % per_stage}.{rest}"] = tensor
    return found


def checkpoint(state: State, **others: Any) -> dict[str, Any]:
    """A checkpoint's file of 2.x about a state dict."""
    position = {"current_file_idx": 2, "position_in_file": 17, "chunk_offset": 3, "files_processed": ["a.parquet"]}
    told = {"global_step": 430, "tokens_processed": 99_000, "data_position": position, "loss": 2.5, "config": TOLD}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    return {
        **told,
        "model_state_dict": state,
        "optimizer_state_dict": optimizer,
        "model_dtype": "torch.float32",
        **others,
    }


def argonne1(layers: int = 3, width: int = 24, vocabulary: int = 50, positions: int = 16, seed: int = 0) -> State:
    """A state dict of 1.x, with its buffers."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) * 0.3

    state = {"token_embedding.weight": random(vocabulary, width), "position_embedding": random(1, positions, width)}
    for layer in range(layers):
        sizes = {f"attn.{name}": (width, width) for name in ("query", "key", "value", "proj")}
        sizes |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for name, size in sizes.items():
            state |= {f"blocks.{layer}.{name}.weight": random(*size), f"blocks.{layer}.{name}.bias": random(size[0])}
        for name in ("ln1", "ln2"):
            state |= {f"blocks.{layer}.{name}.{part}": random(width) for part in ("weight", "bias")}
        state[f"blocks.{layer}.attn.mask"] = torch.ones(positions, positions).tril()[None, None]
    state |= {"ln_f.weight": random(width), "ln_f.bias": random(width), "head.weight": random(vocabulary, width)}
    return state


def argonne1_logits(state: State, heads: int, ids: Tensor) -> Tensor:
    """What 1.x computes, in plain torch: pre-norm blocks, exact GELU, learned positions."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    x = state["token_embedding.weight"][ids] + state["position_embedding"][:, : ids.shape[1]]
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    mask = torch.full((ids.shape[1], ids.shape[1]), -math.inf, dtype=x.dtype).triu(1)
    for block in (f"blocks.{layer}" for layer in range(layers)):
        query, key, value = (
            split(linear(norm(x, f"{block}.ln1"), f"{block}.attn.{n}")) for n in ("query", "key", "value")
        )
        weights = (query @ key.transpose(2, 3) / math.sqrt(query.shape[-1]) + mask).softmax(-1)
        x = x + linear((weights @ value).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.ln2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    return norm(x, "ln_f") @ state["head.weight"].T


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path
