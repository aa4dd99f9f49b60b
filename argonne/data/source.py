"""What the rows of a corpus are, and how lanes make sequences of them: texts, unless a run says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerFast

from argonne.data.corpus.formats import TEXT
from argonne.data.corpus.lines import Column
from argonne.data.corpus.shards import OnBad, Shard
from argonne.data.lanes.packing import SequenceStream
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
