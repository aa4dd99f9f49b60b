"""How a question is put to a model: in the words of lm-evaluation-harness, byte for byte, and as tokens.

``letter`` is its MMLU, where choices are listed and the model goes on with a letter; ``text`` its MMLU of
continuations, where they are not listed and it goes on with the words of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import itemgetter
from typing import Literal

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from argonne.data.errors import DataError
from argonne.data.tokens.tokenizer import plain_backend
from argonne.inference.choices.collection import Subject
from argonne.inference.choices.questions import LETTERS, Question

Score = Literal["letter", "text"]
"""What of a choice is scored."""


def introduction(subject: Subject, score: Score) -> str:
    """What all questions of a subject begin with: what it is about, and the questions that are shown."""
    kind = "multiple choice questions" if score == "letter" else "questions"
    about = subject.name.replace("_", " ")
    shown = (f"{asked(one, score)}{answers(one, score)[one.answer]}\n\n" for one in subject.shown)
    return f"The following are {kind} (with answers) about {about}.\n\n{''.join(shown)}"


def asked(question: Question, score: Score) -> str:
    """A question, up to where the answer is to come."""
    text = question.text.strip()
    if score == "text":
        return f"Question: {text}\nAnswer:"
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, question.choices, strict=False))
    return f"{text}\n{listed}Answer:"


def answers(question: Question, score: Score) -> list[str]:
    """What may come next, for each choice."""
    return [f" {each}" for each in (LETTERS[: len(question.choices)] if score == "letter" else question.choices)]


@dataclass(frozen=True)
class Continuation:
    """Tokens whose likelihood is asked behind others."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """A question as a model sees it."""

    continuations: tuple[Continuation, ...]
    """Of each choice."""
    truncated: bool
    """Whether the first tokens of a context were left out, so that the model can see the rest."""


class Encoding:
    """Texts to tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocabulary: int, window: int, bos: bool | None) -> None:
        """
        Args:
            tokenizer: the model's.
            vocabulary: how many tokens the model knows.
            window: the most that it can see at once.
            bos: whether a text begins with the BOS; None: as the tokenizer has it by itself.

        Raises:
            DataError: a BOS is asked for, and the tokenizer has none.
        """
        self._backend: Tokenizer = plain_backend(tokenizer)
        self._vocabulary, self._window = vocabulary, window
        if bos and tokenizer.bos_token_id is None:
            raise DataError("bos=True is not legal: the tokenizer has no BOS; legal: False")
        probe = self._backend.encode("a")
        own = [token for token, _ in takewhile(itemgetter(1), zip(probe.ids, probe.special_tokens_mask, strict=True))]
        self.beginning: list[int] = own if bos is None else [tokenizer.bos_token_id] if bos else []
        """What comes before every text. An EOS that a tokenizer puts behind one is left out: the text goes on."""

    def of(self, context: str, question: Question, score: Score) -> Asked:
        """The tokens of a question behind an introduction.

        Context and choice are tokenised as one text, and parted where the context's own tokens end. What is longer
        than the window loses its first tokens.

        Raises:
            DataError: a choice has no tokens of its own, or more than the window; or the model does not know a token.
        """
        whole = f"{context}{asked(question, score)}"
        ends = answers(question, score)
        encoded = self._backend.encode_batch([whole, *(whole + end for end in ends)], add_special_tokens=False)
        before, *behind = ([*self.beginning, *each.ids] for each in encoded)
        found, truncated = [], False
        for number, ids in enumerate(behind):
            tokens = ids[len(before) :]
            self._require_fit(tokens, ids, f"choice {LETTERS[number]} of {question.source}")
            kept = min(len(before), self._window + 1 - len(tokens))
            truncated |= kept < len(before)
            found.append(Continuation(tuple(before[len(before) - kept :]), tuple(tokens)))
        return Asked(tuple(found), truncated)

    def _require_fit(self, tokens: Sequence[int], ids: Sequence[int], what: str) -> None:
        if not tokens:
            raise DataError(f"{what} has no tokens of its own; legal: a text of at least one")
        if len(tokens) > self._window:
            raise DataError(f"{what} has {len(tokens)} tokens; legal: {self._window}, which the model can see at once")
        if (most := max(ids)) >= self._vocabulary:
            raise DataError(
                f"the tokenizer gives id {most}, which the model of vocab_size={self._vocabulary} has not; legal: the "
                "model's own tokenizer"
            )
