"""Conversations as token ids, with the positions that are trained; and why others are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, processors
from transformers import PreTrainedTokenizerFast

from argonne.data.chat.rows import BROKEN_JSON, MALFORMED, NO_ASSISTANT, conversation_of
from argonne.data.chat.template import ROLE, UNSTABLE, ChatTemplate, Written
from argonne.data.tokens.byte_pair import contained
from argonne.data.tokens.filters import UNREADABLE, UNTOKENIZABLE
from argonne.data.tokens.tokenizer import plain_backend

TooLong = Literal["drop", "truncate"]
TOO_LONG = "too_long"
REASONS = (BROKEN_JSON, MALFORMED, NO_ASSISTANT, ROLE, UNSTABLE, TOO_LONG, UNTOKENIZABLE, UNREADABLE)
"""Why a row is dropped."""

Trained = npt.NDArray[np.int32]
"""``[2, tokens]``: ids, and below each 1 where it is trained."""


class ChatEncoder:
    """Turns rows into the ids and weights of their conversations.

    A template's special tokens are special in the text of a conversation too, as everywhere that chats are written.
    A token is trained if any of its characters is the assistant's to write, unless it is the first: nothing foretells
    that.

    Args:
        tokenizer: with a chat template.
        longest: tokens of the longest conversation.
        too_long: what becomes of a longer one. ``truncate``: it is cut off behind so many.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, longest: int, too_long: TooLong = "drop") -> None:
        self.template = ChatTemplate(tokenizer)
        self._longest, self._too_long = longest, too_long
        self._backend = plain_backend(tokenizer)
        # What is added to texts comes from the template alone, and places are those of whole tokens, spaces too.
        self._backend.post_processor = processors.ByteLevel(trim_offsets=False)

    def __call__(self, rows: Sequence[object]) -> list[Trained | str]:
        """For each row its tokens, or one of ``REASONS``."""
        found = [conversation_of(row) for row in rows]
        written = [each if isinstance(each, str) else self.template.written(each) for each in found]
        texts = [each.text for each in written if isinstance(each, Written)]
        encoded = iter(self._encoded(texts))
        return [each if isinstance(each, str) else self._trained(each, next(encoded)) for each in written]

    def _encoded(self, texts: list[str]) -> list[Encoding | None]:
        try:
            return list(self._backend.encode_batch(texts, add_special_tokens=False))
        except BaseException as error:
            if not contained(error):
                raise
            return [None] if len(texts) == 1 else [self._encoded([text])[0] for text in texts]

    def _trained(self, written: Written, encoding: Encoding | None) -> Trained | str:
        if encoding is None:
            return UNTOKENIZABLE
        begins, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        weights = np.zeros(len(begins), dtype=np.int32)
        for begin, end in written.trained:
            weights[(begins < end) & (ends > begin)] = 1
        weights[:1] = 0
        if not weights.any():
            return NO_ASSISTANT
        tokens = np.stack([np.array(encoding.ids, dtype=np.int32), weights])
        if len(weights) <= self._longest:
            return tokens
        cut = tokens[:, : self._longest]
        return cut if self._too_long == "truncate" and cut[1].any() else TOO_LONG
