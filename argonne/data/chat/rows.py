"""Rows that hold a conversation: ``messages``, or ``prompt`` and ``completion``; and why others hold none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
CONVERSATION = (MESSAGES, PROMPT, COMPLETION)
"""The columns of conversations; a row has the first, or the other two."""
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
