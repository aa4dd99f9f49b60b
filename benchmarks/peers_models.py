"""The models that ``tp_peers`` compares: Argonne's, a plain dense Llama, and that Llama under PyTorch's DTensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

from argonne.models import ArgonneConfig, ArgonneModel, Batch, CrossEntropyLoss, Execution
from argonne.parallel import Layout, ProcessGroups, complete_gradients, regions_of
from argonne.parallel.communication.shared_sums import sharing_sums

SEED = 1
"""Of the initial weights, which depend on it alone and not on the layout."""

Step = Callable[[Tensor, Tensor], float]
"""One training step on ids and targets ``[batch, sequence]``; returns the mean loss before it."""


@dataclass(frozen=True)
class Contestant:
    """One way to train the same model on a CPU."""

    name: str
    build: Callable[[ArgonneConfig, Layout], Step]
    """Called in each of its processes, with ``torch.distributed`` ready where there are several."""
    layout: Layout
    threads: int = 1
    """In each process."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of each process's environment, besides."""


def argonne_step(config: ArgonneConfig, layout: Layout) -> Step:
    """Argonne in any layout, as its drivers run it: ranks of one machine exchange in shared memory."""
    return _argonne_step(config, sharing_sums(_groups(layout)))


def argonne_gloo_step(config: ArgonneConfig, layout: Layout) -> Step:
    """Argonne in any layout, with Gloo's collectives."""
    return _argonne_step(config, _groups(layout))


def _groups(layout: Layout) -> ProcessGroups:
    return ProcessGroups.single() if layout.world_size == 1 else ProcessGroups.from_world(layout, "cpu")


def _argonne_step(config: ArgonneConfig, groups: ProcessGroups) -> Step:
    model = ArgonneModel(config, Execution(groups))
    model.initialise(SEED)
    parameters = model.sharded_parameters()
    optimizer = adamw(model.parameters())
    cross_entropy = CrossEntropyLoss()

    def step(ids: Tensor, targets: Tensor) -> float:
        batch = Batch(ids, targets)
        loss = cross_entropy(model(batch), model.head, batch) / targets.numel()
        loss.backward()
        complete_gradients(parameters, groups)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def dense_step(config: ArgonneConfig, layout: Layout) -> Step:
    """The plain model in one process."""
    model = PlainLlama(config)
    optimizer = adamw(model.parameters())

    def step(ids: Tensor, targets: Tensor) -> float:
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def dtensor_step(config: ArgonneConfig, layout: Layout) -> Step:
    """The plain model under ``parallelize_module``, as PyTorch's tensor-parallel tutorial sets it up.

    Each block's input becomes a DTensor once, before the projections that share it: their gradients are then
    added before the all-reduce, which the tutorial's plan without ``PrepareModuleInput`` makes for each alone.
    """
    mesh = init_device_mesh("cpu", (layout.tensor,))
    model = PlainLlama(config)
    whole = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())
    block_plan = {
        "self_attn": PrepareModuleInput(
            input_layouts=(Replicate(), None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp": whole,
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    for block in model.model.layers:
        parallelize_module(block, mesh, block_plan)
    parallelize_module(
        model,
        mesh,
        {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        },
    )
    # The fused optimizer takes no mixture of DTensors and tensors, but one group of each.
    sharded = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    others = [parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)]
    optimizer = adamw([{"params": sharded}, {"params": others}])

    def step(ids: Tensor, targets: Tensor) -> float:
        with loss_parallel():
            loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def adamw(parameters: Iterable[Any]) -> torch.optim.AdamW:
    """The optimizer of every contestant."""
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


class PlainLlama(nn.Module):
    """A dense Llama in plain torch, with Argonne's initial weights: parameters have the same names."""

    def __init__(self, config: ArgonneConfig) -> None:
        super().__init__()
        self.model = _Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        whole = ArgonneModel(config, Execution(ProcessGroups.single()))
        whole.initialise(SEED)
        self.load_state_dict({region.name: part for region, part in regions_of(whole.sharded_parameters())})

    def forward(self, ids: Tensor) -> Tensor:
        """``[batch, sequence]`` ids -> ``[batch, sequence, vocabulary]``."""
        return self.lm_head(self.model(ids))


class _Decoder(nn.Module):
    def __init__(self, config: ArgonneConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        positions = torch.arange(config.max_position_embeddings, dtype=torch.float64)
        angle = torch.outer(positions, config.rope_theta**-exponent).repeat(1, 2)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.layers:
            x = block(x, cos, sin)
        return self.norm(x)


class _Block(nn.Module):
    def __init__(self, config: ArgonneConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Attention(nn.Module):
    def __init__(self, config: ArgonneConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query, key_value = (h * config.head_dim for h in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value, bias=False)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # As many heads as the projections give: under tensor parallelism those of this rank.
        query, key, value = (
            rearrange(projection(x), "batch sequence (head dim) -> batch head sequence dim", dim=self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (heads * cos + rotate_half(heads) * sin for heads in (query, key))
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(rearrange(context, "batch head sequence dim -> batch sequence (head dim)"))


class _FeedForward(nn.Module):
    def __init__(self, config: ArgonneConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate_half(heads: Tensor) -> Tensor:
    """Each pair of halves turned by a right angle, as rotary embeddings need it."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
