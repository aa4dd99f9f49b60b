"""The parts of Argonne 1.x, under the names of ``GPT2LMHeadModel``: norms, attention, feed-forward, blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from argonne.models.cache import LayerCache
from argonne.models.execution import Execution
from argonne.models.families.argonne1 import Argonne1Config
from argonne.parallel import (
    Axis,
    ColumnParallelLinear,
    Constant,
    Dropout,
    Normal,
    Partition,
    ProcessGroups,
    RowParallelLinear,
    ShardSpec,
    context_parallel_attention,
    replicated,
    transposed,
)
from argonne.parallel.recomputed import recomputed
from argonne.parallel.sharding.dropout import row_keys
from argonne.parallel.sharding.placement import Placement

QUERIES = 512
"""Queries of which attention that drops has the probabilities at one time: for all of a sequence they are many."""

_GELU: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class BlockInputs:
    """What a block is given besides hidden values. The keys are those of dropout; None: nothing is dropped."""

    sequence: int
    """Positions of a sequence."""
    documents: Tensor | None = None
    """``[batch, sequence]`` numbers: no attention between positions of different ones."""
    queries: Tensor | None = None
    """The keys ``[batch, sequence]`` of all positions, which meet in attention."""
    rows: Tensor | None = None
    """The keys ``[tokens]`` of those that this rank has between the tensor-parallel pairs."""
    positions: Tensor | None = None
    """``[sequence]`` where in its own sequence each is; None: one after the other."""
    cache: LayerCache | None = None
    """What earlier positions have left in this layer, where text is generated."""


class Places:
    """Makes the inputs of blocks."""

    def __init__(self, groups: ProcessGroups) -> None:
        self.groups = groups

    def inputs(
        self,
        sequence: int,
        documents: Tensor | None = None,
        samples: Tensor | None = None,
        key: int = 0,
        whole: bool = True,
    ) -> BlockInputs:
        """For sequences of that length: ``samples`` are their numbers, and ``key`` that of the step, where it drops.

        They always are ``whole``: no ranks share them.
        """
        if samples is None:
            return BlockInputs(sequence, documents)
        queries = row_keys(key, samples, torch.arange(sequence, device=self.groups.device))
        return BlockInputs(sequence, documents, queries, own_tokens(queries.flatten(), self.groups))

    def inputs_at(self, positions: Tensor) -> BlockInputs:
        """For one position of each of several sequences, which layers take for neighbours in one: ``[rows]`` places."""
        return BlockInputs(len(positions), positions=positions)


def own_tokens(x: Tensor, groups: ProcessGroups) -> Tensor:
    """This rank's share ``[tokens]`` of what lies between the tensor-parallel pairs."""
    return x.chunk(groups.tensor.size)[groups.tensor.rank] if groups.sequence_parallel else x


def begins_of(documents: Tensor) -> Tensor:
    """``[batch, sequence]`` numbers -> the position at which each one's document begins."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    changes = documents != documents.roll(1, 1)
    return torch.where(changes, places, 0).cummax(1).values


class LayerNorm(nn.Module):
    """LayerNorm with weight and bias that every rank holds, computed in float32 at least."""

    def __init__(self, config: Argonne1Config, execution: Execution) -> None:
        super().__init__()
        self.eps, self.groups = config.layer_norm_eps, execution.groups
        self.statistics = execution.precision.statistics
        self.weight = nn.Parameter(torch.empty(config.hidden_size, dtype=execution.precision.parameters))
        self.bias = nn.Parameter(torch.empty(config.hidden_size, dtype=execution.precision.parameters))

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, hidden]`` -> the same."""
        return recomputed(self._normed, x)

    def _normed(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(self.statistics), self.bias.to(self.statistics)
        return F.layer_norm(x.to(self.statistics), weight.shape, weight, bias, self.eps).to(x.dtype)

    def shard_specs(self) -> dict[str, ShardSpec]:
        begin = {"weight": Constant(1.0), "bias": Constant(0.0)}
        return {n: replicated(n, self.weight.shape, self.groups, v, used="between") for n, v in begin.items()}

    def output_placement(self) -> Placement:
        return Placement(shares_tokens=self.groups.sequence_parallel)


class PositionEmbedding(nn.Module):
    """A learned vector for each position, which every rank holds; a rank looks up those of the tokens that it has."""

    def __init__(self, config: Argonne1Config, execution: Execution) -> None:
        super().__init__()
        self.groups, self.precision, self.std = execution.groups, execution.precision, config.initializer_range
        shape = config.max_position_embeddings, config.hidden_size
        self.weight = nn.Parameter(torch.empty(shape, dtype=execution.precision.parameters))

    def forward(self, batch: int, inputs: BlockInputs) -> Tensor:
        """``[batch * sequence, hidden]``, or this rank's share of those rows."""
        positions = inputs.positions
        if positions is None:
            positions = torch.arange(inputs.sequence, device=self.groups.device).expand(batch, -1)
            if inputs.documents is not None:
                positions = positions - begins_of(inputs.documents)
            positions = positions.flatten()
        # Past the last: ids that are padded to be shared out (next_token_logits), which nothing sees.
        positions = own_tokens(positions, self.groups).clamp_max(len(self.weight) - 1)
        return F.embedding(positions, self.weight).to(self.precision.compute)

    def shard_specs(self) -> dict[str, ShardSpec]:
        spec = replicated("weight", self.weight.shape, self.groups, Normal(self.std), used="between")
        return {"weight": replace(spec, is_table=True)}

    def output_placement(self) -> Placement:
        return Placement(shares_tokens=self.groups.sequence_parallel)


class ColumnConv1D(ColumnParallelLinear):
    """Column parallel, and saved as a ``Conv1D``: transposed, and fused parts one after the other as one tensor."""

    def shard_specs(self) -> dict[str, ShardSpec]:
        begin, width = {}, 0
        for part in self.parts:
            begin[f"../{part.name}" if part.name else ""] = width
            width += part.features
        specs = {}
        for kind, spec in super().shard_specs().items():
            regions = tuple(
                replace(
                    region,
                    name=kind,
                    whole_shape=(width, *region.whole_shape[1:]),
                    start=(
                        region.start[0] + begin[region.name.removesuffix(kind).removesuffix(".")],
                        *region.start[1:],
                    ),
                )
                for region in spec.regions
            )
            specs[kind] = replace(spec, regions=regions)
        return specs | {"weight": transposed(specs["weight"])}


class RowConv1D(RowParallelLinear):
    """Row parallel, and saved as a ``Conv1D``: transposed."""

    def shard_specs(self) -> dict[str, ShardSpec]:
        specs = super().shard_specs()
        return specs | {"weight": transposed(specs["weight"])}


class Attention(nn.Module):
    """Causal attention of as many heads of keys and values as of queries; a rank has some of them."""

    def __init__(self, config: Argonne1Config, execution: Execution, site: str) -> None:
        super().__init__()
        groups, precision, begin = execution.groups, execution.precision, Normal(config.initializer_range)
        ranks = groups.tensor.size
        three = [Partition.blocks(n, config.head_dim, config.num_attention_heads, ranks) for n in ("q", "k", "v")]
        self.heads = three[0].held[groups.tensor.rank]
        self.statistics = precision.statistics
        self.c_attn = ColumnConv1D(config.hidden_size, three, groups, bias=True, initialiser=begin, precision=precision)
        self.c_proj = RowConv1D(three[0], config.hidden_size, groups, bias=True, initialiser=begin, precision=precision)
        self.attn_dropout = Dropout(config.attention_dropout, f"{site}.attn_dropout")
        self.resid_dropout = Dropout(config.residual_dropout, f"{site}.resid_dropout")

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """``[batch * sequence, hidden]``, or this rank's share of the rows -> the same."""
        query, key, value = rearrange(
            self.c_attn(x),
            "(batch sequence) (three head dim) -> three batch head sequence dim",
            three=3,
            sequence=inputs.sequence,
            head=len(self.heads),
        )
        if inputs.cache is not None:
            found = inputs.cache.attend(query, key, value, None, pinned=False)
        elif inputs.queries is None or not self.attn_dropout.probability:
            found = context_parallel_attention(query, key, value, Axis("context"), inputs.documents)
        else:
            found = self._dropping(query, key, value, inputs.queries, inputs.documents)
        joined = rearrange(found, "batch head sequence dim -> (batch sequence) (head dim)")
        return self.resid_dropout(self.c_proj(joined), inputs.rows)

    def _dropping(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, documents: Tensor | None) -> Tensor:
        """Attention whose probabilities are dropped, for some queries after the other; backward does each once more."""
        length, found = query.shape[2], []
        for begin in range(0, length, QUERIES):
            end = min(begin + QUERIES, length)
            own = None if documents is None else (documents[:, begin:end], documents[:, :end])
            given = query[:, :, begin:end], key[:, :, :end], value[:, :, :end], keys[:, begin:end], own
            if length > QUERIES and torch.is_grad_enabled():
                found.append(checkpoint(self._some, *given, use_reentrant=False, preserve_rng_state=False))
            else:
                found.append(recomputed(self._some, *given))
        return torch.cat(found, 2)

    def _some(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, documents: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The last of the positions that ``key`` and ``value`` are of ask all of them up to their own."""
        asking, asked = query.shape[2], key.shape[2]
        unseen = torch.ones(asking, asked, dtype=torch.bool, device=query.device).triu(asked - asking + 1)
        if documents is not None:
            unseen = unseen | (documents[0][:, None, :, None] != documents[1][:, None, None, :])
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
        probabilities = scores.to(self.statistics).masked_fill(unseen, -torch.inf).softmax(-1).to(query.dtype)
        return self.attn_dropout.of_heads(probabilities, keys, self.heads) @ value


class FeedForward(nn.Module):
    """GELU between a column-parallel and a row-parallel projection."""

    def __init__(self, config: Argonne1Config, execution: Execution, site: str) -> None:
        super().__init__()
        groups, precision, begin = execution.groups, execution.precision, Normal(config.initializer_range)
        part = Partition.split("", config.intermediate_size, groups.tensor.size, groups.layout.uneven_shards)
        self.gelu = _GELU[config.activation]
        self.c_fc = ColumnConv1D(config.hidden_size, [part], groups, bias=True, initialiser=begin, precision=precision)
        self.c_proj = RowConv1D(part, config.hidden_size, groups, bias=True, initialiser=begin, precision=precision)
        self.dropout = Dropout(config.residual_dropout, f"{site}.dropout")

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """``[tokens, hidden]``, or this rank's share of the tokens -> the same."""
        return self.dropout(self.c_proj(recomputed(self.gelu, self.c_fc(x))), inputs.rows)


class Block(nn.Module):
    """One pre-norm transformer block; ``site`` is its name in the whole model."""

    def __init__(self, config: Argonne1Config, execution: Execution, site: str) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config, execution)
        self.attn = Attention(config, execution, f"{site}.attn")
        self.ln_2 = LayerNorm(config, execution)
        self.mlp = FeedForward(config, execution, f"{site}.mlp")

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        x = x + self.attn(self.ln_1(x), inputs)
        return x + self.mlp(self.ln_2(x), inputs)
