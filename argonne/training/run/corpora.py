"""The corpora of a run: which shards they are, how they are mixed, and the stream of samples made of them."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerFast

from argonne.data import (
    CachedStream,
    LaneState,
    LaneStream,
    Mixture,
    Shard,
    TokenCache,
    check_cache,
    default_lanes,
    describe,
    find_shards,
    fingerprint,
    naming,
    open_shards,
    parse_globs,
    quarantine,
    quarantined,
    restore,
    states_of_source,
)
from argonne.data.chat.packing import Pass
from argonne.data.chat.source import Conversations
from argonne.data.lanes.adoption import adopt
from argonne.data.source import Reading
from argonne.training.config import DataFlags
from argonne.training.run.identity import RunIdentity


@dataclass(frozen=True)
class Corpus:
    """One of the corpora that a run mixes."""

    weight: float
    """Its share of the sequences."""
    shards: tuple[Shard, ...]
    globs: tuple[str, ...] = ()
    """What named them; empty for the defaults."""
    cache: TokenCache | None = None
    """Its tokens, where they are made before training."""


@dataclass(frozen=True)
class Corpora:
    """All that a run reads."""

    parts: tuple[Corpus, ...]
    validation: tuple[Shard, ...]
    """The held-out text; empty where there is none."""
    named: Mapping[str, tuple[Shard, ...]]
    """The shards of each named held-out set."""
    flags: DataFlags
    seed: int
    kept_lanes: int | None = None
    """The lanes of the run before."""
    restored: bool = False
    """Whether the rows of every shard are those that the run before listed, readable or not."""
    sequences: int | None = None
    """Of one pass over the data, where a run counts its steps by passes (``--epochs``)."""

    @classmethod
    def open(
        cls,
        flags: DataFlags,
        seed: int,
        saved: RunIdentity | None = None,
        whole: bool = True,
    ) -> Corpora:
        """Find the shards and read their footers.

        Args:
            seed: of the order of ``--no-streaming``.
            saved: the identity of the run that is continued, if one is. With ``on_bad_shard="skip"`` what it
                had to do without stays away, and what can be opened no more keeps its place.
            whole: False does not read through what has no footer: for a look at what can be refused.

        Raises:
            DataError: a glob matches nothing, or a shard cannot be read.
        """
        saved = saved or RunIdentity()
        listings = saved.shards
        globs = parse_globs(flags.data_glob or ())
        restored = flags.on_bad_shard == "skip" and not flags.accept_data_change and len(listings) == len(globs)
        parts = []
        for number, each in enumerate(globs):
            with naming("data_glob", each.globs):
                paths = find_shards(each.globs)
                on_bad, column = flags.on_bad_shard, flags.source.column
                if restored:
                    shards = restore(listings[number], paths, "skip", column, whole)
                else:
                    shards = open_shards(paths, on_bad, column, whole)
            parts.append(Corpus(each.weight, shards, each.globs))
        validation: tuple[Shard, ...] = ()
        if flags.validation_glob:
            with naming("validation_glob", flags.validation_glob):
                validation = open_shards(find_shards(flags.validation_glob), "raise", flags.text_column, whole)
        named = {}
        for name, glob in flags.named_globs.items():
            with naming("eval", [f"{name}={glob}"]):
                named[name] = open_shards(find_shards([glob]), "raise", flags.source.column, whole)
        return cls(tuple(parts), validation, named, flags, seed, saved.lanes, restored, saved.sequences)

    @property
    def trained_on(self) -> list[str]:
        """A line for each named held-out set that has shards of the training data."""
        own = {os.path.realpath(str(shard.path)) for shard in self.shards}
        lines = []
        for name, shards in self.named.items():
            both = [shard.path.name for shard in shards if os.path.realpath(str(shard.path)) in own]
            if both:
                more = f" and {len(both) - 1} more" if len(both) > 1 else ""
                lines.append(f"note: eval {name} has text that is trained on: {both[0]}{more} is of --data-glob too")
        return lines

    @functools.cached_property
    def lanes(self) -> int:
        """Of each corpus: those asked for, or of the run before, or as many as the rows give work to."""
        return self.flags.data_lanes or self.kept_lanes or default_lanes(sum(sum(each.rows) for each in self.shards))

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Those of every corpus, one after the other."""
        return tuple(shard for part in self.parts for shard in part.shards)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the run's data this data: JSON values."""
        mixed = {"weights": [part.weight for part in self.parts]} if len(self.parts) > 1 else {}
        return {
            "fingerprint": fingerprint(self.shards),
            "shards": [describe(part.shards) for part in self.parts],
            **mixed,
            **self.flags.source.identity,
            **({} if self.sequences is None else {"sequences": self.sequences}),
            "lanes": self.lanes,
            "streaming": self.flags.streaming,
            "block_size": self.flags.block_size,
            "document_boundary_tokens": self.flags.add_document_boundary_tokens,
            "document_mask": self.flags.document_mask,
        }

    @property
    def quarantined(self) -> list[dict[int, str]]:
        """For each corpus, why the shards at these indices cannot be read."""
        return [quarantined(part.shards) for part in self.parts]

    def without(self, reasons: Sequence[Mapping[int, str]]) -> Corpora:
        """The same with these shards quarantined: what every rank makes of the union of all ranks'."""
        parts = []
        for part, away in zip(self.parts, reasons, strict=True):
            with naming("data_glob", part.globs):
                parts.append(replace(part, shards=quarantine(part.shards, away, self.restored)))
        return replace(self, parts=tuple(parts))

    def with_caches(self, caches: Sequence[TokenCache]) -> Corpora:
        """The same with the tokens of each corpus made."""
        return replace(
            self, parts=tuple(replace(part, cache=cache) for part, cache in zip(self.parts, caches, strict=True))
        )

    def check_block_size(self, tokenizer: PreTrainedTokenizerFast, boundary: tuple[int, int] | None) -> None:
        """Raise ``DataError`` unless every corpus fills a sequence."""
        for part in self.parts:
            with naming("data_glob", part.globs):
                if part.cache is not None:
                    check_cache(part.cache, self.flags.block_size)
                else:
                    self.flags.source.check(self._reading(part, tokenizer, boundary))

    def count(self, source: Conversations, tokenizer: PreTrainedTokenizerFast) -> Pass:
        """What one pass over the one corpus has."""
        (part,) = self.parts
        with naming("data_glob", part.globs):
            return source.count(self._reading(part, tokenizer, None), self.lanes)

    def mixture(
        self,
        tokenizer: PreTrainedTokenizerFast,
        boundary: tuple[int, int] | None,
        served: Sequence[int],
        states: Mapping[int, LaneState],
    ) -> Mixture:
        """The samples of the lanes ``served``, from ``states`` (of all lanes, or none yet) on."""
        streams: list[LaneStream] = []
        for source, part in enumerate(self.parts):
            own = states_of_source(states, source, self.lanes)
            size = self.flags.block_size
            if part.cache is not None:
                streams.append(CachedStream(part.cache, size, self.lanes, served, self.seed + source, own))
            else:
                reading = self._reading(part, tokenizer, boundary)
                streams.append(self.flags.source.sequences(reading, self.lanes, served, own))
        return Mixture(streams, [part.weight for part in self.parts])

    def _reading(self, part: Corpus, tokenizer: PreTrainedTokenizerFast, boundary: tuple[int, int] | None) -> Reading:
        flags = self.flags
        report = functools.partial(print, flush=True)
        return Reading(part.shards, tokenizer, flags.block_size, boundary, flags.on_bad_shard, report)

    def adopted(
        self, states: Mapping[int, LaneState], saved: RunIdentity, same_tokens: bool
    ) -> tuple[dict[int, LaneState], str]:
        """The lanes of a run that was saved with other data as they go on with this, and a line that says how."""
        found: dict[int, LaneState] = {}
        kept = total = 0
        for source, part in enumerate(self.parts):
            listing = saved.shards[source] if source < len(saved.shards) else []
            own = states_of_source(states, source, self.lanes) if listing else None
            if own is None:
                continue
            if part.cache is not None:
                size, seed = self.flags.block_size, self.seed + source
                lanes, here = CachedStream.adopt(part.cache, size, self.lanes, seed, own), self.lanes
            else:
                lanes, here = adopt(own, listing, part.shards, same_tokens)
            found |= {source * self.lanes + lane: state for lane, state in enumerate(lanes)}
            kept, total = kept + here, total + self.lanes
        line = f"{kept} of {total} lanes keep their places, the others restart their pass over the data"
        if not self.flags.streaming:
            line = f"{kept} of {total} lanes go on as many sequences into the shuffled order of the new data"
        return found, line

    def shard_of(self, lane_key: int, state: LaneState) -> Shard:
        """The shard in which a lane stands; keys are those of ``Mixture.states``."""
        return self.parts[lane_key // self.lanes].shards[state.position.shard]

    def shards_seen(self, states: Mapping[int, LaneState]) -> int:
        """Shards that have been begun: all of a corpus once a lane has been through it."""
        seen = 0
        for source, part in enumerate(self.parts):
            own = [state.position for key, state in states.items() if key // self.lanes == source]
            # In a shuffled order, positions tell nothing of what was before them.
            whole = part.cache is not None or any(position.epoch > 0 for position in own)
            seen += len(part.shards) if whole else 1 + max((position.shard for position in own), default=-1)
        return seen
