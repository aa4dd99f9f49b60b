"""Rows that hold a conversation: ``messages``, or ``prompt`` and ``completion``; and why others hold none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from argonne.data.corpus.formats import COMPLETION, CONVERSATION, MESSAGES, PROMPT, Texts, reading
from argonne.data.corpus.location import open_source
from argonne.data.corpus.row_groups import RowGroups
from argonne.data.corpus.shards import Shard, require_readable, require_rows_of
from argonne.data.errors import DataError

Message = dict[str, Any]
"""``role`` and ``content``, both text; and what else a template may ask for."""

BROKEN_JSON, MALFORMED, NO_ASSISTANT = "broken_json", "malformed", "no_assistant"
ASSISTANT = "assistant"


@dataclass(frozen=True)
class Conversation:
    """The messages of a row, in order."""

    messages: tuple[Message, ...]
    given: int = 0
    """So many of the first are a prompt: not trained, whoever says them."""

    @property
    def trained(self) -> list[int]:
        """The indices of the messages that are trained: the assistant's behind the prompt."""
        return [n for n, each in enumerate(self.messages) if n >= self.given and each["role"] == ASSISTANT]


def conversation_of(row: object) -> Conversation | str:
    """The conversation of a row, or the reason for which it has none.

    A row is what a file has in its columns, by their names. None, or a member of an ``Enum``, stands for one that is no
    JSON; and a column may hold JSON as text.
    """
    try:
        if row is None or isinstance(row, Enum):
            return BROKEN_JSON
        if not isinstance(row, Mapping):
            return MALFORMED
        if row.get(MESSAGES) is not None:
            found = Conversation(_messages(_decoded(row[MESSAGES])))
        else:
            prompt = _messages(row.get(PROMPT), "user")
            found = Conversation((*prompt, *_messages(row.get(COMPLETION), ASSISTANT)), len(prompt))
    except json.JSONDecodeError:
        return BROKEN_JSON
    except (ValueError, RecursionError):
        return MALFORMED
    return found if found.trained else NO_ASSISTANT


def _decoded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _messages(value: Any, role: str | None = None) -> tuple[Message, ...]:
    """Messages as a template is given them; a text is one message of ``role``. Raises ``ValueError`` for all else."""
    if role is not None and isinstance(value, str):
        return ({"role": role, "content": value},)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ValueError("no list of messages")
    found = []
    for each in value:
        if not isinstance(each, Mapping) or not all(isinstance(each.get(name), str) for name in ("role", "content")):
            raise ValueError("no message")
        found.append({name: held for name, held in each.items() if held is not None})
    return tuple(found)


class ConversationRows(Texts):
    """Rows of a row group as Arrow holds them; as Python when they are asked for."""

    def __init__(self, columns: pa.Table) -> None:
        columns.validate(full=True)  # offsets that point outside the data would end the process
        self._columns = columns

    def __len__(self) -> int:
        return int(self._columns.num_rows)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return int(self._columns.nbytes)

    def rows(self, first: int, end: int) -> list[object]:
        """The rows from ``first`` to ``end``, as ``conversation_of`` takes them."""
        return list(self._columns.slice(first, end - first).to_pylist())


class ConversationGroups(RowGroups):
    """The rows of a corpus of conversations; see ``RowGroups``."""

    def _open(self, shard: Shard, row_group: int) -> Texts:
        return open_conversations(shard, row_group)

    def _streams(self, shard: int, row_group: int) -> bool:
        return False


def open_conversations(shard: Shard, row_group: int) -> ConversationRows:
    """The columns of conversations of one row group.

    Raises:
        DataError: the row group cannot be read, fails its checksum, or is not the one that was opened.
    """
    kind, where = require_readable(shard, row_group), f"row group {row_group} of shard {shard.path}"
    assert shard.column == CONVERSATION
    if kind != "Parquet file":
        raise DataError(f"{where}: conversations are not read from an {kind}; legal: a Parquet file")
    with reading(where), open_source(shard.path) as source:
        if source.size() != shard.size:
            raise DataError(f"{where}: the file has {source.size():,} bytes, not {shard.size:,}: the file was changed")
        with pq.ParquetFile(source, page_checksum_verification=True) as parquet:
            names = parquet.schema_arrow.names
            wanted = [name for name in (MESSAGES, PROMPT, COMPLETION) if name in names]
            rows = ConversationRows(parquet.read_row_group(row_group, columns=wanted))
    require_rows_of(shard, row_group, len(rows))
    return rows
