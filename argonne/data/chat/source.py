"""Conversations as a source of batches: what instruction tuning reads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from argonne.data.chat.packing import ConversationReader, ConversationStream, Pass, count_pass, sequences_of_pass
from argonne.data.chat.rows import CONVERSATION
from argonne.data.chat.template import ChatTemplate
from argonne.data.chat.tokens import ChatEncoder, TooLong
from argonne.data.corpus.lines import Column
from argonne.data.lanes.packing import Packed
from argonne.data.lanes.plan import LanePlan
from argonne.data.lanes.state import LaneState
from argonne.data.mixture import LaneStream
from argonne.data.source import Reading
from argonne.data.tokens.filters import NO_FILTERS


@dataclass(frozen=True)
class Conversations:
    """Every row is a conversation, of which the assistant's part is trained; a ``Source``."""

    chat_template: str | None = None
    """What counts in place of the tokenizer's own."""
    too_long: TooLong = "drop"

    @property
    def column(self) -> Column:
        """Those of conversations."""
        return CONVERSATION

    @property
    def weighs(self) -> bool:
        """Only the assistant's part is trained."""
        return True

    @property
    def identity(self) -> dict[str, Any]:
        """The columns, and what becomes of long conversations; the template is the tokenizer's."""
        return {"text_column": list(CONVERSATION), "filters": asdict(NO_FILTERS), "too_long": self.too_long}

    def prepared(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
        """With the chat template in it. Raises ``DataError`` where there is none, or it cannot be used."""
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        ChatTemplate(tokenizer)
        return tokenizer

    def template(self, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str | None]:
        """The chat template, and the token that ends a turn."""
        template = ChatTemplate(tokenizer)
        return template.text, template.ending

    def check(self, reading: Reading) -> None:
        """Raise ``DataError`` where no conversation can be used."""
        reader = self._reader(reading, lanes=1)
        next(reader.documents(0, reader.plan.enter(0, epoch=0)))

    def sequences(
        self, reading: Reading, lanes: int, served: Sequence[int], states: Sequence[LaneState] | None
    ) -> LaneStream:
        """Several conversations in each."""
        padding = _padding(reading.tokenizer)
        return ConversationStream(self._reader(reading, lanes), reading.block_size, served, padding, states)

    def held_out(self, reading: Reading, limit: int | None) -> list[Packed]:
        """Several conversations in each, and each in one."""
        reader, size = self._reader(reading, lanes=1), reading.block_size + 1
        return list(itertools.islice(sequences_of_pass(reader, size, _padding(reading.tokenizer)), limit))

    def count(self, reading: Reading, lanes: int) -> Pass:
        """What one pass over the shards has."""
        return count_pass(self._reader(reading, lanes), reading.block_size + 1)

    def _reader(self, reading: Reading, lanes: int) -> ConversationReader:
        encoder = ChatEncoder(reading.tokenizer, reading.block_size + 1, self.too_long)
        plan = LanePlan(reading.shards, lanes)
        return ConversationReader(reading.shards, plan, encoder, reading.on_bad, reading.report)


def _padding(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id of what fills a sequence up."""
    return next(each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if each is not None)
