"""The text of tokens that come one by one: whole characters only, up to the first stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerFast

from argonne.parallel.errors import ArgonneError

_CONTEXT = 6
"""Tokens of the prompt that are decoded with the first new ones: what a token reads as may depend on those before."""
_INCOMPLETE = "\ufffd"
"""What a tokenizer writes for bytes that are no character yet, or never."""


def check_stops(stops: Sequence[str]) -> None:
    """Raise ``ArgonneError`` for a stop string that every text has."""
    if "" in stops:
        raise ArgonneError("stop='' ends every text before it begins; legal: at least one character")


class TextFollower:
    """Hears of a text's tokens and keeps its text; a ``Follower``.

    Args:
        tokenizer: of the tokens.
        prompt: what the new tokens follow.
        stops: the text ends before the first of these, wherever tokens begin and end.
        show: is handed the text bit by bit: no part of a character, and nothing that may turn out to be a stop string.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        show: Callable[[str], None] | None = None,
    ) -> None:
        self._tokenizer, self._stops, self._show = tokenizer, tuple(stops), show
        self._ids = list(prompt[-_CONTEXT:])
        self._from, self._read = 0, len(self._ids)
        self._text, self._shown, self._searched = "", 0, 0
        self._is_stopped = False

    def take(self, token: int) -> bool:
        """Hear of a new token; whether a stop string has ended the text."""
        self._ids.append(token)
        new = self._decoded()
        if new and not new.endswith(_INCOMPLETE):
            self._add(new)
        return self._is_stopped

    def close(self) -> str:
        """The text, of which no more comes: without the stop string, and with what never became a character."""
        if not self._is_stopped:
            self._add(self._decoded())
        self._say(len(self._text))
        return self._text

    def _decoded(self) -> str:
        """What is not in the text yet, as far as it reads now."""
        before = self._tokenizer.decode(self._ids[self._from : self._read])
        return self._tokenizer.decode(self._ids[self._from :])[len(before) :]

    def _add(self, new: str) -> None:
        self._from, self._read = self._read, len(self._ids)
        self._text += new
        found = [at for stop in self._stops if (at := self._text.find(stop, self._searched)) >= 0]
        if found:
            self._text, self._is_stopped = self._text[: min(found)], True
        # The longest end of the text that begins a stop string: it waits for what comes.
        held = max((n for stop in self._stops for n in range(1, len(stop)) if self._text.endswith(stop[:n])), default=0)
        self._searched = len(self._text) - held
        if not self._is_stopped:
            self._say(self._searched)

    def _say(self, end: int) -> None:
        if self._show is not None and end > self._shown:
            self._show(self._text[self._shown : end])
        self._shown = max(self._shown, end)
