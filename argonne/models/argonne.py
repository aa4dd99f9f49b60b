"""The Argonne 2.x model: one definition, dense in one process and sharded over any layout.

Module names are Hugging Face Llama's; what is fused here (``qkv_proj``, ``gate_up_proj``) still declares
the whole tensors it holds under their Llama names.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from argonne.kernels import apply_rope, rms_norm, rope_tables, swiglu
from argonne.models.config import ArgonneConfig
from argonne.parallel import (
    ColumnParallelLinear,
    Constant,
    Normal,
    Objective,
    Partition,
    Precision,
    ProcessGroups,
    RowParallelLinear,
    ShardedParameter,
    ShardSpec,
    VocabParallelEmbedding,
    VocabParallelHead,
    column_parallel_linear,
    gather_from_sequence_region,
    initialise,
    replicated,
    sharded_parameters,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_logits,
)
from argonne.parallel.collectives import all_gather


class RMSNorm(nn.Module):
    """RMSNorm with a weight that every rank holds."""

    def __init__(self, config: ArgonneConfig, groups: ProcessGroups, precision: Precision) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(config.hidden_size, dtype=precision.parameters))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def shard_specs(self) -> dict[str, ShardSpec]:
        return {"weight": replicated("weight", self.weight.shape, self.groups, Constant(1.0))}


class Attention(nn.Module):
    """Grouped-query attention; a rank has a run of query heads and the key-value heads that they use."""

    def __init__(self, config: ArgonneConfig, groups: ProcessGroups, precision: Precision) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        ranks = groups.tensor.size
        group = config.num_attention_heads // config.num_key_value_heads
        queries = Partition.blocks("q_proj", self.head_dim, config.num_attention_heads, ranks)
        key_value_heads = tuple(range(own[0] // group, own[-1] // group + 1) for own in queries.held)
        self.qkv_proj = ColumnParallelLinear(
            config.hidden_size,
            [
                queries,
                Partition("k_proj", self.head_dim, key_value_heads),
                Partition("v_proj", self.head_dim, key_value_heads),
            ],
            groups,
            initialiser=_initial(config),
            precision=precision,
        )
        self.o_proj = RowParallelLinear(
            queries,
            config.hidden_size,
            groups,
            initialiser=_residual_initial(config),
            precision=precision,
        )
        own, shared = queries.held[groups.tensor.rank], key_value_heads[groups.tensor.rank]
        self.head_of_query = [head // group - shared[0] for head in own]
        regular = [i * len(shared) // len(own) for i in range(len(own))]
        self.is_grouped = len(own) % len(shared) == 0 and self.head_of_query == regular

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``[batch * sequence, hidden]``, or this rank's share of the rows -> the same; causal.

        ``cos`` and ``sin`` are ``[sequence, head_dim]``.
        """
        sequence = len(cos)
        query, key, value = self.qkv_proj(x).split(self.qkv_proj.splits, dim=-1)
        query = apply_rope(self._heads(query, sequence), cos, sin)
        key = apply_rope(self._heads(key, sequence), cos, sin)
        value = self._heads(value, sequence)
        if not self.is_grouped:  # the rank's query heads begin or end within a group
            key, value = key[:, self.head_of_query], value[:, self.head_of_query]
        grouped = key.shape[1] != query.shape[1]
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return self.o_proj(rearrange(context, "batch head sequence dim -> (batch sequence) (head dim)"))

    def _heads(self, x: Tensor, sequence: int) -> Tensor:
        return rearrange(
            x, "(batch sequence) (head dim) -> batch head sequence dim", sequence=sequence, dim=self.head_dim
        )


class FeedForward(nn.Module):
    """SwiGLU between a fused column-parallel and a row-parallel projection."""

    def __init__(self, config: ArgonneConfig, groups: ProcessGroups, precision: Precision) -> None:
        super().__init__()
        ranks = groups.tensor.size
        uneven = groups.layout.uneven_shards
        gate, up = (Partition.split(n, config.intermediate_size, ranks, uneven) for n in ("gate_proj", "up_proj"))
        self.gate_up_proj = ColumnParallelLinear(
            config.hidden_size,
            [gate, up],
            groups,
            initialiser=_initial(config),
            precision=precision,
        )
        self.down_proj = RowParallelLinear(
            up,
            config.hidden_size,
            groups,
            initialiser=_residual_initial(config),
            precision=precision,
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, hidden]``, or this rank's share of the tokens -> the same."""
        gate, up = self.gate_up_proj(x).split(self.gate_up_proj.splits, dim=-1)
        return self.down_proj(swiglu(gate, up))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ArgonneConfig, groups: ProcessGroups, precision: Precision) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config, groups, precision)
        self.self_attn = Attention(config, groups, precision)
        self.post_attention_layernorm = RMSNorm(config, groups, precision)
        self.mlp = FeedForward(config, groups, precision)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The embedding, the blocks and the last norm: everything but the head."""

    def __init__(self, config: ArgonneConfig, groups: ProcessGroups, precision: Precision) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, groups, initialiser=_initial(config), precision=precision
        )
        self.layers = nn.ModuleList(Block(config, groups, precision) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config, groups, precision)
        table_dtype = torch.promote_types(precision.compute, torch.float32)
        # A little further than the longest sequence: ids may be padded to share them out (next_token_logits).
        positions = config.max_position_embeddings + groups.tensor.size - 1
        cos, sin = rope_tables(positions, config.head_dim, config.rope_theta, table_dtype)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.recompute = False

    def forward(self, ids: Tensor) -> Tensor:
        """``[batch, sequence]`` ids -> ``[batch * sequence, hidden]``, or this rank's share of the rows."""
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = self.embed_tokens(ids.flatten())
        for block in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin)
        return self.norm(x)


class ArgonneModel(nn.Module):
    """A causal language model over any tensor-parallel layout, with or without sequence parallelism.

    Construct it under ``with torch.device(...)``: the parameters are empty there until ``initialise`` or a
    checkpoint fills them, and cost nothing on ``meta``.

    Raises:
        LayoutError: the shape cannot be shared out as the layout asks.
    """

    def __init__(self, config: ArgonneConfig, groups: ProcessGroups, precision: Precision = Precision()) -> None:
        super().__init__()
        config.check_layout(groups.layout)
        self.config = config
        self.groups = groups
        self.model = Decoder(config, groups, precision)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else VocabParallelHead(
                config.vocab_size,
                config.hidden_size,
                groups,
                initialiser=_initial(config),
                precision=precision,
            )
        )

    @property
    def head(self) -> VocabParallelEmbedding | VocabParallelHead:
        """The holder of the output weight: the embedding when tied."""
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        """``[batch, sequence]`` ids -> this rank's logits ``[batch, sequence, its tokens]``."""
        return vocab_parallel_logits(self.model(ids), self.head).unflatten(0, ids.shape)

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        reduction: Literal["sum", "none"] = "none",
        objective: Objective = Objective(),
    ) -> Tensor:
        """The loss in nats of each position ``[batch, sequence]``, or (cheaper to train on) their sum.

        Positions whose target is ``objective.ignore_index`` have none. The logits never exist whole.
        """
        x = self.model(ids)
        losses = vocab_parallel_linear_cross_entropy(x, self.head, targets.flatten(), objective, reduction)
        return losses if reduction == "sum" else losses.view(targets.shape)

    @torch.no_grad()
    def next_token_logits(self, ids: Tensor) -> Tensor:
        """``[batch, sequence]`` ids -> the last position's logits ``[batch, vocabulary]``, on every rank."""
        batch, sequence = ids.shape
        axis, head = self.groups.tensor, self.head
        x = self.model(F.pad(ids, (0, -sequence % axis.size if self.groups.sequence_parallel else 0)))
        if self.groups.sequence_parallel:  # what was added comes last, and no earlier position sees it
            x = gather_from_sequence_region(x, axis)
        last = x.unflatten(0, (batch, -1))[:, sequence - 1]
        local = column_parallel_linear(last, head.weight, None, axis, head.precision)
        whole = rearrange(all_gather(local, axis), "rank batch token -> batch (rank token)")
        # Only the last ranks have padding, so that it lies behind every real token.
        return whole[:, : self.config.vocab_size]

    def sharded_parameters(self) -> list[ShardedParameter]:
        """Every parameter with the whole tensors that it holds regions of."""
        return sharded_parameters(self, self.groups)

    def initialise(self, seed: int) -> None:
        """Fill every parameter with values that depend on the seed and the whole tensor's name only."""
        initialise(self.sharded_parameters(), seed)


def _initial(config: ArgonneConfig) -> Normal:
    return Normal(config.initializer_range)


def _residual_initial(config: ArgonneConfig) -> Normal:
    """Projections into the residual stream, of which there are 2 a block, begin smaller by sqrt(2 blocks)."""
    return Normal(config.initializer_range / (2 * config.num_hidden_layers) ** 0.5)
