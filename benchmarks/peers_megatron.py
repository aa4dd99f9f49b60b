"""The plain Llama of ``peers_models`` on Megatron-Core's tensor-parallel layers, for ``tp_peers``.

Megatron-Core is no requirement of anything here: ``pip install --no-deps megatron-core`` makes it a contestant. Its
layers are used as its GPT model does, with queries, keys and values in one product, and gate and up in another. What
needs a GPU (Transformer Engine, Apex's fused accumulation of weight gradients) is left out.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from argonne.models import ArgonneConfig
from argonne.parallel import Layout
from benchmarks.peers_models import PlainLlama, Step, adamw, rotate_half


def is_installed() -> bool:
    """Whether Megatron-Core is there to compare with."""
    return importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.core") is not None


def megatron_step(config: ArgonneConfig, layout: Layout) -> Step:
    """Megatron-Core's layers and its cross-entropy, over the ranks of ``torch.distributed``."""
    with warnings.catch_warnings():  # of each library for GPUs that is not there
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=layout.tensor)
        model = PlainLlama(config)
        _share_out(model, config)
    optimizer = adamw(model.parameters())

    def step(ids: Tensor, targets: Tensor) -> float:
        logits, _ = model.lm_head(model.model(ids))
        # Its loss wants the sequence first, and writes into the logits that it is given.
        losses = vocab_parallel_cross_entropy(rearrange(logits, "b s v -> s b v").contiguous(), targets.T.contiguous())
        loss = losses.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _share_out(model: PlainLlama, config: ArgonneConfig) -> None:
    """Put Megatron's layers in the place of the dense ones, with this rank's part of their weights."""
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

    ranks, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    settings = ModelParallelConfig(
        tensor_model_parallel_size=ranks,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )
    common: dict[str, Any] = {"config": settings, "init_method": lambda weight: None}

    def part(weight: Tensor, dim: int) -> Tensor:
        return weight.detach().chunk(ranks, dim)[rank]

    def column(*layers: nn.Linear) -> nn.Module:
        fused = ColumnParallelLinear(
            layers[0].in_features, sum(layer.out_features for layer in layers), bias=False, **common
        )
        fused.weight.data.copy_(torch.cat([part(layer.weight, 0) for layer in layers]))
        return fused

    def row(layer: nn.Linear) -> nn.Module:
        parallel = RowParallelLinear(
            layer.in_features, layer.out_features, bias=False, input_is_parallel=True, skip_bias_add=False, **common
        )
        parallel.weight.data.copy_(part(layer.weight, 1))
        return parallel

    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        qkv = column(attention.q_proj, attention.k_proj, attention.v_proj)
        block.self_attn = _Attention(config, ranks, qkv, row(attention.o_proj))
        block.mlp = _FeedForward(column(mlp.gate_proj, mlp.up_proj), row(mlp.down_proj))
    embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, **common)
    embedding.weight.data.copy_(part(model.model.embed_tokens.weight, 0))
    model.model.embed_tokens = embedding
    model.lm_head = column(model.lm_head)


class _Attention(nn.Module):
    def __init__(self, config: ArgonneConfig, ranks: int, qkv: nn.Module, o_proj: nn.Module) -> None:
        super().__init__()
        self.head_dim, self.qkv, self.o_proj = config.head_dim, qkv, o_proj
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.heads = [count // ranks for count in heads]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        packed, _ = self.qkv(x)
        heads = rearrange(packed, "batch sequence (head dim) -> batch head sequence dim", dim=self.head_dim)
        query, key, value = heads.split(self.heads, dim=1)
        query, key = (heads * cos + rotate_half(heads) * sin for heads in (query, key))
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(rearrange(context, "batch head sequence dim -> batch sequence (head dim)"))[0]


class _FeedForward(nn.Module):
    def __init__(self, gate_up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x)[0].chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)[0]
