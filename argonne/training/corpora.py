"""The corpora of a run: which shards they are, how they are mixed, and the stream of samples made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from argonne.data import (
    LaneState,
    Mixture,
    SequenceStream,
    Shard,
    check_block_size,
    default_lanes,
    find_shards,
    fingerprint,
    open_shards,
    parse_globs,
    states_of_source,
)
from argonne.training.config import DataFlags


@dataclass(frozen=True)
class Corpus:
    """One of the corpora that a run mixes."""

    globs: tuple[str, ...]
    weight: float
    """Its share of the sequences."""
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Corpora:
    """All that a run reads."""

    parts: tuple[Corpus, ...]
    validation: tuple[Shard, ...]
    """The held-out text; empty where there is none."""
    lanes: int

    @classmethod
    def open(cls, flags: DataFlags) -> Corpora:
        """Find the shards and read their footers.

        Raises:
            DataError: a glob matches nothing, or a shard cannot be read.
        """
        parts = tuple(
            Corpus(each.globs, each.weight, open_shards(find_shards(each.globs)))
            for each in parse_globs(flags.data_glob or ())
        )
        validation = open_shards(find_shards(flags.validation_glob)) if flags.validation_glob else ()
        rows = sum(sum(shard.rows) for part in parts for shard in part.shards)
        return cls(parts, validation, flags.data_lanes or default_lanes(rows))

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Those of every corpus, one after the other."""
        return tuple(shard for part in self.parts for shard in part.shards)

    def identity(self, flags: DataFlags) -> dict[str, Any]:
        """What makes the run's data this data: JSON values."""
        mixed = {"weights": [part.weight for part in self.parts]} if len(self.parts) > 1 else {}
        return {
            "fingerprint": fingerprint(self.shards),
            **mixed,
            "lanes": self.lanes,
            "block_size": flags.block_size,
            "document_boundary_tokens": flags.add_document_boundary_tokens,
            "document_mask": flags.document_mask,
        }

    def check_block_size(
        self, tokenizer: PreTrainedTokenizerFast, block_size: int, boundary: tuple[int, int] | None
    ) -> None:
        """Raise ``DataError`` unless every corpus fills a sequence."""
        for part in self.parts:
            check_block_size(part.shards, tokenizer, block_size, boundary)

    def mixture(
        self,
        tokenizer: PreTrainedTokenizerFast,
        block_size: int,
        boundary: tuple[int, int] | None,
        served: Sequence[int],
        states: Mapping[int, LaneState],
    ) -> Mixture:
        """The samples of the lanes ``served``, from ``states`` (of all lanes, or none yet) on."""
        streams = [
            SequenceStream(
                part.shards,
                tokenizer,
                block_size,
                self.lanes,
                boundary,
                served,
                states_of_source(states, source, self.lanes),
            )
            for source, part in enumerate(self.parts)
        ]
        return Mixture(streams, [part.weight for part in self.parts])

    def shard_of(self, lane_key: int, state: LaneState) -> Shard:
        """The shard in which a lane stands; keys are those of ``Mixture.states``."""
        return self.parts[lane_key // self.lanes].shards[state.position.shard]

    def shards_seen(self, states: Mapping[int, LaneState]) -> int:
        """Shards that have been begun: all of a corpus once a lane has been through it."""
        seen = 0
        for source, part in enumerate(self.parts):
            own = [state.position for key, state in states.items() if key // self.lanes == source]
            whole = any(position.epoch > 0 for position in own)
            seen += len(part.shards) if whole else 1 + max((position.shard for position in own), default=-1)
        return seen
