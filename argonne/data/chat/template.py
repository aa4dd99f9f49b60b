"""A chat template: conversations as text, and which characters of it the assistant is to write."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from argonne.data.chat.rows import ASSISTANT, Conversation, Message
from argonne.data.errors import DataError, one_line

ROLE, UNSTABLE = "role", "unstable"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Any other may be one that a template passes over without a word.
_USUAL_ROLES = ("system", "user")
_PROBE = Conversation(({"role": "user", "content": "Who are you?"}, {"role": ASSISTANT, "content": "A model."}))

Span = tuple[int, int]
"""The first character, and the one behind the last."""


@dataclass(frozen=True)
class Written:
    """A conversation as text."""

    text: str
    trained: tuple[Span, ...]
    """What the assistant is to write, with the marker that ends a turn."""


class ChatTemplate:
    """The template of a tokenizer, a Jinja program that writes messages as text.

    What is trained is what the template itself marks (``{% generation %}``). Where it marks nothing, that is found by
    writing the conversation up to each turn of the assistant's, without it and with it: the turn is what has been
    added, from where an answer is asked for up to the marker behind its content. What is written only where a
    conversation ends, an EOS say, is left out in that. A template whose text of earlier turns depends on later ones
    cannot be cut so, and the conversation is not used.

    Args:
        tokenizer: of which the template is, and the special tokens that end a turn.

    Raises:
        DataError: there is no template, or it cannot write a question and an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        text = tokenizer.chat_template
        if not isinstance(text, str):
            found = f"has {len(text)} chat templates" if isinstance(text, Mapping) else "has no chat template"
            raise DataError(f"the tokenizer {found}; legal: one, or --chat-template FILE")
        self.text = text
        self._special = dict(tokenizer.special_tokens_map)
        self._marked = _MARKS.search(text) is not None
        markers = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._markers = re.compile("|".join(map(re.escape, markers))) if markers else None
        try:
            self._closing = self._closing_of(self._write(_PROBE.messages))
        except Exception as error:  # templates are programs of others
            raise DataError(f"the chat template cannot be applied: {one_line(error)}") from error
        probed = self.written(_PROBE)
        if isinstance(probed, str):
            raise DataError(f"the chat template does not show what the assistant says ({probed})")
        self.ending = self._marker(probed.text[slice(*probed.trained[-1])])
        """The special token that ends a turn; None where it is none."""

    def written(self, conversation: Conversation) -> Written | str:
        """The conversation as text; or why it cannot be used: ``ROLE`` or ``UNSTABLE``.

        ``ROLE``: the template refuses a turn, or leaves it out: a role that it does not know, or an order of turns.
        """
        messages = conversation.messages
        try:
            text, marks = self._write_marked(messages) if self._marked else (self._write(messages), [])
            if not all(self._shows(number, messages, text) for number in range(len(messages))):
                return ROLE
        except Exception:  # whatever a template raises
            return ROLE
        if self._marked:
            turns = [number for number, each in enumerate(messages) if each["role"] == ASSISTANT]
            if len(marks) != len(turns):
                return UNSTABLE
            found = [span for turn, span in zip(turns, marks, strict=True) if turn >= conversation.given]
            return Written(text, tuple(found))
        spans: list[Span] = []
        for number in conversation.trained:
            span = self._turn(text, messages[: number + 1], whole=number + 1 == len(messages))
            if span is None or (spans and span[0] < spans[-1][1]):
                return UNSTABLE
            spans.append(span)
        return Written(text, tuple(spans))

    def _turn(self, text: str, messages: Sequence[Message], whole: bool) -> Span | None:
        """Where the last of ``messages``, with which ``text`` begins, is to be written; None where that is not so."""
        after = text if whole else self._try(messages)
        before, asked = self._try(messages[:-1]), self._try(messages[:-1], asks=True)
        if not whole and after is not None:
            after = after.removesuffix(self._closing)
        before = before and before.removesuffix(self._closing)
        if after is None or before is None or not (text.startswith(after) and after.startswith(before)):
            return None
        asks = asked is not None and after.startswith(asked)
        begin = len(asked) if asks and asked is not None else len(before)
        said = messages[-1]["content"]
        place = next(((at, form) for form in (said, said.strip()) if (at := after.find(form, begin)) >= 0), None)
        if place is None:
            return None  # it was rewritten
        at, form = place
        # A template that has no other text where an answer is asked for leaves its header to be told by what it is not:
        # white space, which an answer may begin with.
        if (not asks or asked == before) and after[begin:at].strip():
            begin = at
        end = at + len(form)
        return begin, end + len(self._ending(after[end:]))

    def _closing_of(self, probe: str) -> str:
        """What ``probe`` ends with that is not there where the conversation goes on."""
        longer = self._try([*_PROBE.messages, *_PROBE.messages]) or ""
        pairs = enumerate(zip(probe, longer, strict=False))
        place = next((at for at, (one, other) in pairs if one != other), min(len(probe), len(longer)))
        for found in self._markers.finditer(probe) if self._markers is not None else ():
            if found.start() < place < found.end():  # the marker that ends it begins as the next turn's does
                place = found.start()
        return probe[place:] if longer.endswith(probe[place:]) else ""

    def _ending(self, tail: str) -> str:
        """Of the text behind a turn's content, what ends the turn: up to the first special token, or all text."""
        if self._markers is not None and (found := self._markers.search(tail)):
            return tail[: found.end()]
        return tail.rstrip() or tail

    def _marker(self, turn: str) -> str | None:
        found = list(self._markers.finditer(turn)) if self._markers is not None else []
        return found[-1].group() if found and found[-1].end() == len(turn.rstrip()) else None

    def _shows(self, number: int, messages: Sequence[Message], text: str) -> bool:
        """Whether a message is in the text; of the assistant's, that is seen where they are looked for."""
        message = messages[number]
        if message["role"] == ASSISTANT:
            return True
        if message["content"].strip() not in text:
            return False
        if message["role"] in _USUAL_ROLES:
            return True
        return self._try([*messages[:number], *messages[number + 1 :]]) != text

    def _try(self, messages: Sequence[Message], asks: bool = False) -> str | None:
        """The text; None where the template refuses, but of no messages the empty one."""
        try:
            return self._write(messages, asks)
        except Exception:
            return None if messages else ""

    def _write(self, messages: Sequence[Message], asks: bool = False) -> str:
        written, _ = render_jinja_template(
            [list(messages)], chat_template=self.text, add_generation_prompt=asks, **self._special
        )
        return str(written[0])

    def _write_marked(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        written, marks = render_jinja_template(
            [list(messages)], chat_template=self.text, return_assistant_tokens_mask=True, **self._special
        )
        return str(written[0]), [(begin, end) for begin, end in marks[0]]
