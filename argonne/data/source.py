"""What the rows of a corpus are, and how lanes make sequences of them: texts, unless a run says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerFast

from argonne.data.corpus.formats import TEXT
from argonne.data.corpus.lines import Column
from argonne.data.corpus.shards import OnBad, Shard
from argonne.data.errors import DataError
from argonne.data.lanes.packing import Packed, SequenceStream
from argonne.data.lanes.reader import check_block_size
from argonne.data.lanes.state import LaneState
from argonne.data.mixture import LaneStream
from argonne.data.tokens.filters import FILTERS, Filters


@dataclass(frozen=True)
class Reading:
    """How the rows of shards are read, whatever they are."""

    shards: tuple[Shard, ...]
    tokenizer: PreTrainedTokenizerFast
    block_size: int
    boundary: tuple[int, int] | None = None
    """The (BOS, EOS) ids around each document, of texts."""
    on_bad: OnBad = "raise"
    report: Callable[[str], None] | None = None


class Source(Protocol):
    """Where batches come from. Frozen, and the same on every rank."""

    @property
    def column(self) -> Column:
        """What a file must have: a column of texts, or some of several."""
        ...

    @property
    def weighs(self) -> bool:
        """Whether its sequences say which of their tokens are trained (``Packed.weights``)."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which documents there are: JSON values."""
        ...

    def prepared(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
        """The tokenizer as it is to be used. Raises ``DataError`` if it cannot be."""
        ...

    def template(self, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str | None] | None:
        """The chat template, and the token that ends a turn, if any; None of a source without one."""
        ...

    def check(self, reading: Reading) -> None:
        """Raise ``DataError`` for a corpus that fills no sequence."""
        ...

    def sequences(
        self, reading: Reading, lanes: int, served: Sequence[int], states: Sequence[LaneState] | None
    ) -> LaneStream:
        """The sequences of the lanes ``served``, from ``states`` (of all lanes) on."""
        ...

    def held_out(self, reading: Reading, limit: int | None) -> list[Packed]:
        """The first sequences of one pass over the rows, at most ``limit``.

        Raises ``DataError`` where there are none.
        """
        ...


@dataclass(frozen=True)
class Texts:
    """Every row is a text, and documents are cut into sequences: what pretraining reads."""

    column: str = TEXT
    filters: Filters = FILTERS

    @property
    def weighs(self) -> bool:
        """All tokens are trained."""
        return False

    @property
    def identity(self) -> dict[str, Any]:
        """The column and the filters."""
        return {"text_column": self.column, "filters": asdict(self.filters)}

    def prepared(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
        """As it is."""
        return tokenizer

    def template(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """None: texts are no chats."""

    def check(self, reading: Reading) -> None:
        """Raise ``DataError`` unless it fills one sequence."""
        check_block_size(
            reading.shards, reading.tokenizer, reading.block_size, reading.boundary, reading.on_bad, self.filters
        )

    def sequences(
        self, reading: Reading, lanes: int, served: Sequence[int], states: Sequence[LaneState] | None
    ) -> LaneStream:
        """Documents joined end to end."""
        return SequenceStream(
            reading.shards,
            reading.tokenizer,
            reading.block_size,
            lanes,
            reading.boundary,
            served,
            states,
            on_bad=reading.on_bad,
            report=reading.report,
            filters=self.filters,
        )

    def held_out(self, reading: Reading, limit: int | None) -> list[Packed]:
        """Those that are full, no text in them twice."""
        stream = SequenceStream(
            reading.shards,
            reading.tokenizer,
            reading.block_size,
            lanes=1,
            boundary=reading.boundary,
            served=[0],
            filters=self.filters,
        )
        found: list[Packed] = []
        while limit is None or len(found) < limit:
            sequence = stream.next_sequence(0)
            at = stream.state(0).position
            # A sequence that runs into the second pass repeats text, unless it ends the first exactly.
            ends = (at.epoch, at.shard, at.row_group, at.row, at.token) <= (1, 0, 0, 0, 0)
            if ends:
                found.append(sequence)
            if at.epoch > 0:
                break
        if not found:
            size = reading.block_size
            raise DataError(f"the held-out text has fewer than block_size+1={size + 1} tokens; legal: more text")
        return found
