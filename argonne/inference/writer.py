"""Prompts as text in, texts out: what ``examples/generate.py`` does with a model that is open."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from transformers import PreTrainedTokenizerFast

from argonne.inference.generate import cache_line, continue_all
from argonne.inference.prompts import Message, encoded, encoded_chat
from argonne.inference.sampling import Sampling
from argonne.inference.text import TextFollower
from argonne.models import LanguageModel
from argonne.output import show
from argonne.parallel.communication.collectives import gather_objects

PATIENCE = timedelta(days=7)
"""How long the other ranks wait for somebody who types."""


@dataclass(frozen=True)
class Writer:
    """Writes texts, on the first rank; every rank calls it with the same arguments."""

    model: LanguageModel
    tokenizer: PreTrainedTokenizerFast
    sampling: Sampling
    seed: int
    ends: Collection[int]
    """The tokens that end a text."""
    stops: Sequence[str] = ()
    """The strings that end a text, before which it is cut off."""
    chat: bool = False
    """Prompts are what a user says, and texts are answers."""

    def write(self, prompts: Sequence[str], batch: int, stream: bool = False) -> None:
        """Print the text of each prompt, in their order: prompt and continuation, or of a chat the answer."""
        ids = [self._ids([{"role": "user", "content": prompt}]) for prompt in prompts]
        self._tell(cache_line(self.model, ids, self.sampling, batch))
        for start in range(0, len(ids), batch):
            own = ids[start : start + batch]
            heads = ["" if self.chat else self.tokenizer.decode(prompt) for prompt in own]
            if stream:
                self._show(heads[0])
            texts = self._continue(own, start, self._show if stream else None)
            for head, text in zip(heads, texts, strict=True):
                self._show("\n" if stream else head + text + "\n")

    def converse(self, typed: Iterable[str]) -> None:
        """Answer what is ``typed`` (on the first rank), after all turns before; without ``chat``, continue it."""
        groups = self.model.groups
        groups.set_timeout(PATIENCE)
        self._tell(cache_line(self.model, [[0] * self.model.longest_sequence], self.sampling, 1) + " at most")
        lines = iter(typed)
        messages: list[Message] = []
        turn = 0
        while (said := gather_objects(next(lines, None) if groups.is_first else None, groups.world)[0]) is not None:
            messages = [*(messages if self.chat else []), {"role": "user", "content": said}]
            (text,) = self._continue([self._ids(messages)], turn, self._show)
            self._show("\n")
            messages.append({"role": "assistant", "content": text})
            turn += 1

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        return encoded_chat(self.tokenizer, messages) if self.chat else encoded(self.tokenizer, messages[-1]["content"])

    def _continue(self, prompts: Sequence[Sequence[int]], first: int, shown: Callable[[str], None] | None) -> list[str]:
        followers = [TextFollower(self.tokenizer, prompt, self.stops, shown) for prompt in prompts]
        continue_all(
            self.model, prompts, self.sampling, self.seed, self.ends, followers=followers, first=first, cached=True
        )
        return [follower.close() for follower in followers]

    def _show(self, text: str) -> None:
        if self.model.groups.is_first:
            show(text, end="")

    def _tell(self, line: str) -> None:
        if self.model.groups.is_first:
            print(line, file=sys.stderr, flush=True)  # the text stands alone on stdout
