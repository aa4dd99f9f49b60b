"""The parts of a Llama-type model: rotary tables, norms, attention, feed-forward and blocks.

Module names are Hugging Face Llama's; what is fused here (``qkv_proj``, ``gate_up_proj``) still declares
the whole tensors it holds under their Llama names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from argonne import kernels
from argonne.kernels import apply_rope, apply_rope_packed, rms_norm, swiglu
from argonne.kernels.rotation import rope_frequencies, tables_of
from argonne.kernels.swiglu import VECTOR
from argonne.models.cache import CachePass, LayerCache
from argonne.models.config import ArgonneConfig
from argonne.models.execution import Execution
from argonne.models.rows import attending, gated, normed, suits_rows, turned, whole_tables
from argonne.parallel import (
    ColumnParallelLinear,
    Constant,
    LayoutError,
    Normal,
    Partition,
    RowParallelLinear,
    ShardSpec,
    context_parallel_attention,
    replicated,
    shard_sequence,
)
from argonne.parallel.communication.groups import Axis
from argonne.parallel.context_parallel.variable_length import DocumentBounds, can_vary_length, document_bounds
from argonne.parallel.recomputed import recomputed
from argonne.parallel.sharding.placement import Placement
from argonne.parallel.sharding.uses import Uses
from argonne.parallel.tensor_parallel.gemm import Array
from argonne.parallel.tensor_parallel.shared_heads import copy_heads
from argonne.parallel.tensor_parallel.token_blocks import uses_by_token_blocks


@dataclass(frozen=True)
class AttentionInputs:
    """What attention needs besides hidden values: where in their sequences the positions are that a rank works on."""

    cos: Tensor
    """``[positions, head_dim / 2]`` rotary table, of the positions that this rank has."""
    sin: Tensor
    axis: Axis
    """The ranks that share the sequences; a lone axis when this rank has them whole."""
    documents: Tensor | None = None
    """``[batch, sequence]`` numbers, of whole sequences: no attention between positions of different ones."""
    bounds: DocumentBounds | None = None
    """Of the same documents, where attention can do without a mask."""
    cache: LayerCache | None = None
    """What earlier positions have left in this layer, where text is generated."""

    @cached_property
    def turn(self) -> tuple[Array, Array]:
        """The ``rows.whole_tables``, where the positions are one of each row."""
        return whole_tables(self.cos.numpy(), self.sin.numpy())


class RotaryTables(nn.Module):
    """The rotary tables of a model's positions; they exist where the model computes, also while it is on ``meta``."""

    def __init__(self, config: ArgonneConfig, execution: Execution) -> None:
        super().__init__()
        groups, precision = execution.groups, execution.precision
        self.context, self.compiled = groups.context, execution.compile
        self.varies_length = can_vary_length(groups.device, precision.compute, config.head_dim)
        table_dtype = torch.promote_types(precision.compute, torch.float32)
        # A little further than the longest sequence: ids may be padded to share them out (next_token_logits).
        positions = config.max_position_embeddings + groups.tensor.size - 1
        with groups.device:  # also when the parameters are still on meta: no one would fill these
            scaling, plain = config.rope_scaling, (config.head_dim, config.rope_theta)
            frequencies = rope_frequencies(*plain) if scaling is None else scaling.frequencies(*plain)
            scale = 1.0 if scaling is None else scaling.scale
            cos, sin = tables_of(positions, frequencies, table_dtype, scale)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def inputs(self, sequence: int, whole: bool = False, documents: Tensor | None = None) -> AttentionInputs:
        """For sequences of that length: this context-parallel rank's share of them, or all."""
        axis = Axis("context") if whole else self.context
        cos, sin = (shard_sequence(table[:sequence], axis, 0) for table in (self.cos, self.sin))
        bounds = None
        if documents is not None and axis.size == 1 and self.varies_length:
            bounds = document_bounds(documents, self.compiled)
        return AttentionInputs(cos, sin, axis, documents, bounds)

    def inputs_at(self, positions: Tensor) -> AttentionInputs:
        """For one position of each of several sequences, which layers take for neighbours in one: ``[rows]`` places."""
        cos, sin = self.cos[positions], self.sin[positions]
        return AttentionInputs(cos, sin, Axis("context"))


class RMSNorm(kernels.RMSNorm):
    """RMSNorm with a weight that every rank holds."""

    def __init__(self, config: ArgonneConfig, execution: Execution) -> None:
        dtype, backend = execution.precision.parameters, execution.kernels
        super().__init__(config.hidden_size, config.rms_norm_eps, dtype=dtype, backend=backend)
        self.groups = execution.groups
        self._uses = uses_by_token_blocks(self.groups)

    @property
    def weights(self) -> Sequence[Tensor]:
        """One for each token block, in a reproducible run."""
        return (self.weight,) if self._uses is None else self._uses.of(self.weight)

    def of_rows(self) -> Callable[[Array], Array]:
        """``forward`` of ``[rows, hidden]``, the short way (``Block.of_rows``)."""
        return partial(normed, weight=self.weight.numpy(), eps=self.eps)

    def uses_apart(self) -> dict[str, Uses]:
        return {} if self._uses is None else {"weight": self._uses}

    def shard_specs(self) -> dict[str, ShardSpec]:
        return {"weight": replicated("weight", self.weight.shape, self.groups, Constant(1.0), used="between")}

    def output_placement(self) -> Placement:
        return Placement(shares_tokens=self.groups.sequence_parallel)


class HeadNorm(nn.Module):
    """RMSNorm of each head on its own, with one weight for all of them, which every rank holds.

    A rank's gradient of it is of its own heads, and of what its own queries ask of heads that it shares.

    Raises:
        LayoutError: a canonical block of a reproducible run has no whole heads.
    """

    def __init__(self, part: Partition, config: ArgonneConfig, execution: Execution) -> None:
        super().__init__()
        self.part, self.groups = part, execution.groups
        self.head_dim, self.eps, self.kernels = config.head_dim, config.rms_norm_eps, execution.kernels
        self.weight = nn.Parameter(torch.ones(config.head_dim, dtype=execution.precision.parameters))
        self._uses = None if self.groups.tensor.blocks is None else Uses(self._blocks())

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, heads of this rank x head_dim]`` -> the same."""
        weights = (self.weight,) if self._uses is None else self._uses.of(self.weight)
        # In a reproducible run, the heads of a block together: of each, the gradient is a sum of its own.
        blocks = {"block": len(weights), "dim": self.head_dim}
        heads = rearrange(x, "token (block head dim) -> block token head dim", **blocks)
        normal = rms_norm(heads, weights, self.eps, backend=self.kernels)
        return rearrange(normal, "block token head dim -> token (block head dim)")

    def of_rows(self) -> Callable[[Array], Array]:
        """``forward`` of ``[rows, heads, head_dim]``, the short way."""
        return partial(normed, weight=self.weight.numpy(), eps=self.eps)

    def uses_apart(self) -> dict[str, Uses]:
        return {} if self._uses is None else {"weight": self._uses}

    def shard_specs(self) -> dict[str, ShardSpec]:
        return {"weight": replicated("weight", self.weight.shape, self.groups, Constant(1.0), used="inside")}

    def output_placement(self) -> Placement:
        return Placement((replace(self.part, name=""),))

    def _blocks(self) -> int:
        """Of this rank's heads in a reproducible run: those of a canonical block, or each, where blocks share heads."""
        axis, heads = self.groups.tensor, self.part.features // self.part.block
        if self.part.first_has_gradient:
            return len(self.part.held[axis.rank])
        if heads % (axis.blocks or 1):
            raise LayoutError(
                f"{heads} heads of {self.part.name} are not whole in {axis.blocks} blocks of a reproducible run, as "
                "the norms of heads need them; legal: a divisor of the heads"
            )
        return axis.own_blocks


class Attention(nn.Module):
    """Grouped-query attention; a rank has a run of query heads and the key-value heads that they use."""

    def __init__(self, config: ArgonneConfig, execution: Execution) -> None:
        super().__init__()
        groups, precision = execution.groups, execution.precision
        self.head_dim, self.kernels, self.is_pinned = config.head_dim, execution.kernels, groups.reproducible
        ranks = groups.tensor.size
        group = config.num_attention_heads // config.num_key_value_heads
        queries = Partition.blocks("q_proj", self.head_dim, config.num_attention_heads, ranks)
        key_value_heads = tuple(range(own[0] // group, own[-1] // group + 1) for own in queries.held)
        self.axis, self.blocks_of_head = groups.tensor, config.blocks_of_head(groups.tensor.blocks)
        is_shared = self.blocks_of_head > 1
        keys, values = (Partition(name, self.head_dim, key_value_heads, is_shared) for name in ("k_proj", "v_proj"))
        self.qkv_proj = ColumnParallelLinear(
            config.hidden_size,
            [queries, keys, values],
            groups,
            bias=config.attention_bias,
            initialiser=initial(config),
            precision=precision,
        )
        self.o_proj = RowParallelLinear(
            queries,
            config.hidden_size,
            groups,
            bias=config.output_bias,
            initialiser=residual_initial(config),
            precision=precision,
        )
        self.q_norm = HeadNorm(queries, config, execution) if config.qk_norm else None
        self.k_norm = HeadNorm(keys, config, execution) if config.qk_norm else None
        own, shared = queries.held[groups.tensor.rank], key_value_heads[groups.tensor.rank]
        self.key_value_heads = len(shared)
        self.head_of_query = [head // group - shared[0] for head in own]
        regular = [i * len(shared) // len(own) for i in range(len(own))]
        self.is_grouped = len(own) % len(shared) == 0 and self.head_of_query == regular

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        """``[batch * positions, hidden]``, or this rank's share of the rows -> the same; causal."""
        packed = self.qkv_proj(x)
        if inputs.cache is not None:
            query, key, value = (heads.transpose(1, 2) for heads in self._turned(packed, inputs))
            used = None if self.is_grouped else self.head_of_query
            context = inputs.cache.attend(query, key, value, used, self.is_pinned)
        else:
            query, key, value = recomputed(self._asking, packed, inputs)
            context = context_parallel_attention(
                query, key, value, inputs.axis, inputs.documents, inputs.bounds, pinned=self.is_pinned
            )
        return self.o_proj(rearrange(context, "batch head sequence dim -> (batch sequence) (head dim)"))

    def _asking(self, packed: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as attention takes them: ``[batch, its heads, positions, head_dim]``."""
        query, key, value = self._turned(packed, inputs)
        key, value = (copy_heads(heads, self.axis, self.blocks_of_head, dim=2) for heads in (key, value))
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        if not self.is_grouped:  # query heads begin or end within a group
            key, value = key[:, self.head_of_query], value[:, self.head_of_query]
        return query, key, value

    def _turned(self, packed: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normed where the model does and turned by their positions, and values.

        Of ``[batch * positions, local features]``, each as ``[batch, positions, its heads, head_dim]``.
        """
        if self.q_norm is None or self.k_norm is None:
            heads = self._heads(packed, inputs)
            return apply_rope_packed(heads, inputs.cos, inputs.sin, self.key_value_heads, backend=self.kernels)
        query, key, value = packed.split(self.qkv_proj.splits, dim=-1)
        query, key = (
            apply_rope(self._heads(norm(x), inputs), inputs.cos, inputs.sin, backend=self.kernels)
            for norm, x in ((self.q_norm, query), (self.k_norm, key))
        )
        return query, key, self._heads(value, inputs)

    def _heads(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        sizes = {"sequence": len(inputs.cos), "dim": self.head_dim}
        return rearrange(x, "(batch sequence) (head dim) -> batch sequence head dim", **sizes)


class FeedForward(nn.Module):
    """SwiGLU between a fused column-parallel and a row-parallel projection."""

    def __init__(self, config: ArgonneConfig, execution: Execution) -> None:
        super().__init__()
        groups, precision, self.kernels = execution.groups, execution.precision, execution.kernels
        ranks = groups.tensor.size
        uneven, blocks = groups.layout.uneven_shards, groups.tensor.blocks
        self.is_pinned = blocks is not None and config.intermediate_size // blocks % VECTOR != 0
        gate, up = (Partition.split(n, config.intermediate_size, ranks, uneven) for n in ("gate_proj", "up_proj"))
        self.gate_up_proj = ColumnParallelLinear(
            config.hidden_size,
            [gate, up],
            groups,
            initialiser=initial(config),
            precision=precision,
        )
        self.down_proj = RowParallelLinear(
            up,
            config.hidden_size,
            groups,
            initialiser=residual_initial(config),
            precision=precision,
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, hidden]``, or this rank's share of the tokens -> the same."""
        return self.down_proj(swiglu(self.gate_up_proj(x), pinned=self.is_pinned, backend=self.kernels))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ArgonneConfig, execution: Execution) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config, execution)
        self.self_attn = Attention(config, execution)
        self.post_attention_layernorm = RMSNorm(config, execution)
        self.mlp = FeedForward(config, execution)
        self.is_short = suits_rows(execution)

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), inputs)
        normal, x = self.post_attention_layernorm(attended, x)
        return x + self.mlp(normal)

    def of_rows(self, keys: Tensor, values: Tensor) -> Callable[[Array, AttentionInputs, CachePass], Array] | None:
        """``forward`` of one position of each row ``[rows, hidden]``, prepared for many: a short way (``rows.py``).

        ``keys`` and ``values`` are what a cache has of this layer, whose first pass is over. None where there is no
        such way, or weights come and go (FSDP).
        """
        if not self.is_short or any(type(parameter.data) is not Tensor for parameter in self.parameters()):
            return None
        own, mlp = self.self_attn, self.mlp
        project, leave = own.qkv_proj.of_rows(), own.o_proj.of_rows()
        widen, narrow = mlp.gate_up_proj.of_rows(), mlp.down_proj.of_rows()
        attend = attending(keys, values, own.head_of_query, own.is_grouped)
        before, between = self.input_layernorm.of_rows(), self.post_attention_layernorm.of_rows()
        norms = None if own.q_norm is None or own.k_norm is None else (own.q_norm.of_rows(), own.k_norm.of_rows())

        def of_rows(x: Array, inputs: AttentionInputs, cached: CachePass) -> Array:
            heads = project(before(x)).reshape(len(x), -1, own.head_dim)
            both, value = heads[:, : -own.key_value_heads], heads[:, -own.key_value_heads :]
            if norms is not None:
                query, key = both[:, : -own.key_value_heads], both[:, -own.key_value_heads :]
                both = np.concatenate((norms[0](query), norms[1](key)), 1)
            context = attend(cached, turned(both, *inputs.turn), value)
            x = x + leave(context.reshape(len(x), -1))
            x += narrow(gated(widen(between(x))))
            return x

        return of_rows


def initial(config: ArgonneConfig) -> Normal:
    return Normal(config.initializer_range)


def residual_initial(config: ArgonneConfig) -> Normal:
    """Projections into the residual stream, of which there are 2 a block, begin smaller by sqrt(2 blocks)."""
    return Normal(config.initializer_range / (2 * config.num_hidden_layers) ** 0.5)
