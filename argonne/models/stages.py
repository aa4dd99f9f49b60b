"""How the Argonne model is cut into stages, and what one of them computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argonne.models.cache import CachePass, KeyValueCache
from argonne.models.compilation import compile_block
from argonne.models.contract import Head
from argonne.models.execution import Execution
from argonne.parallel import Layout, Normal, VocabParallelEmbedding, VocabParallelHead, balance
from argonne.parallel.tensor_parallel.gemm import Array


@dataclass(frozen=True)
class Span:
    """The part of the model that one stage is."""

    layers: range
    is_first: bool = True
    """It begins with the embedding."""
    is_last: bool = True
    """It ends with the last norm and the head."""

    def has_embedding(self, tied: bool) -> bool:
        """Whether it needs the embedding's weight: to look up tokens, or as a ``tied`` head."""
        return self.is_first or (self.is_last and tied)


class Places(Protocol):
    """What tells blocks where in their sequences the positions are that they work on."""

    def inputs(self, sequence: int) -> Any:
        """What each block is given besides hidden values, for sequences of that length; further words are its own."""

    def inputs_at(self, positions: Tensor) -> Any:
        """The same for one position of each of several sequences, as of ``CachePass.positions``."""


class Stage(nn.Module):
    """Some blocks in a row, behind the embedding in the first stage, before the last norm and the head in the last.

    The modules are the model's own, which has them under Hugging Face's names; here they are only called. Without a
    pipeline one stage is the whole model.
    """

    def __init__(
        self,
        span: Span,
        execution: Execution,
        places: Places,
        embed_tokens: VocabParallelEmbedding | None,
        blocks: Sequence[nn.Module],
        norm: nn.Module | None,
        lm_head: VocabParallelHead | None,
    ) -> None:
        super().__init__()
        self.span, self.execution = span, execution
        self._places = (places,)  # in a tuple: it is no part of the stage, whoever moves or shards it
        self.embed_tokens = embed_tokens
        if embed_tokens is not None and span.is_last and lm_head is None:
            embed_tokens.working.at_once = True  # it is the head too
        self.blocks = nn.ModuleList(blocks)
        if execution.compile:
            for block in blocks:
                compile_block(block)
        self.norm = norm
        self.lm_head = lm_head

    @property
    def head(self) -> Head:
        """The holder of the output weight, of the last stage: the embedding when tied."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        assert head is not None
        return head

    def forward(self, x: Tensor, sequence: int, cached: CachePass | None = None, **given: Any) -> Tensor:
        """Ids ``[batch, positions]``, or what the stage before returned -> ``[batch * positions, hidden]``.

        Under sequence parallelism this rank's share of those rows.

        Args:
            x: of this context-parallel rank's positions, or of all positions if they are ``whole``.
            sequence: the number of positions of the sequences, which a stage cannot tell from hidden values.
            cached: what earlier positions have left, and takes in these; after its first pass ``x`` is one position
                of each row, ``[1, rows]``, and rows that were added to share them out.
            given: what else ``Places.inputs`` takes: ``documents`` ``[batch, sequence]``, as of ``Batch``; or
                ``whole``, where every context-parallel rank has all positions.
        """
        if cached is None or cached.is_first:
            inputs = self.block_inputs(sequence, **given)
        else:
            inputs = self._places[0].inputs_at(F.pad(cached.positions, (0, sequence - len(cached.positions))))
        if self.span.is_first:
            x = self.embed(x, inputs)
        if cached is not None and cached.is_one_each and (rows := self._of_rows(cached.cache)):
            return _through(rows, x, inputs, cached)
        for number, block in zip(self.span.layers, self.blocks, strict=True):
            own = inputs if cached is None else replace(inputs, cache=cached.layer(number))
            x = self.execution.run(block, x, own, number=number)
        return x if self.norm is None else self.norm(x)

    def _of_rows(self, cache: KeyValueCache) -> Sequence[Callable[..., Array]]:
        """The short way of one position of each row through each block, and the norm; empty where they have none."""
        first = self.span.layers.start
        if first not in cache.prepared:
            makers = [getattr(block, "of_rows", None) for block in self.blocks]
            ways = [make and make(*cache.layer(number)) for number, make in zip(self.span.layers, makers, strict=True)]
            last: Any = self.norm
            if all(ways) and last is not None:
                norm = last.of_rows()
                ways.append(lambda x, inputs, cached: norm(x))
            cache.prepared[first] = ways if all(ways) else []
        return cache.prepared[first]

    def block_inputs(self, sequence: int, **given: Any) -> Any:
        """What each block is given besides hidden values, where nothing is cached; as of ``forward``."""
        return self._places[0].inputs(sequence, **given)

    def embed(self, ids: Tensor, inputs: Any) -> Tensor:
        """What the first block is given of ids ``[batch, positions]``."""
        assert self.embed_tokens is not None
        vectors: Tensor = self.embed_tokens(ids.flatten())
        return vectors


@np.errstate(all="ignore")  # of what is not finite the logits tell
def _through(rows: Sequence[Callable[..., Array]], x: Tensor, inputs: Any, cached: CachePass) -> Tensor:
    """One position of each row through a stage, ``[rows, hidden]``."""
    y = x.numpy()
    for of_rows in rows:
        y = of_rows(y, inputs, cached)
    return torch.from_numpy(y)


class Shape(Protocol):
    """What a model of stages asks of the shape that it is made of."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def initializer_range(self) -> float: ...
    @property
    def parameter_count(self) -> int: ...
    @property
    def block_parameter_count(self) -> int: ...
    def as_json(self) -> dict[str, Any]: ...
    def check_layout(self, layout: Layout) -> None: ...
    def flops_per_token(self, sequence: int) -> float: ...


Holder = TypeVar("Holder", VocabParallelEmbedding, VocabParallelHead)


def of_vocabulary(kind: type[Holder], config: Shape, execution: Execution) -> Holder:
    """The embedding or the head of a model of that shape."""
    initialiser, precision = Normal(config.initializer_range), execution.precision
    return kind(config.vocab_size, config.hidden_size, execution.groups, initialiser=initialiser, precision=precision)


def cut(config: Shape, stages: int) -> tuple[list[float], list[Span]]:
    """The cost of each stage in units of a block's matrix products, and what it holds; balanced by cost.

    A token costs a block its parameters in multiply-adds (and attention, which all blocks share alike); the head
    costs vocabulary x hidden. The embedding is a lookup, whose gradient is a pass over hidden values: a block has
    some 12 x hidden of those for each, so it counts as one part in 12 x hidden of a block's parameters.
    """
    block = config.block_parameter_count
    head = config.vocab_size * config.hidden_size / block
    embedding = 12 * config.hidden_size / block
    runs = balance([1.0] * config.num_hidden_layers, stages, embedding, head)
    spans = [Span(run, index == 0, index == stages - 1) for index, run in enumerate(runs)]
    costs = [len(span.layers) + embedding * span.is_first + head * span.is_last for span in spans]
    return costs, spans
