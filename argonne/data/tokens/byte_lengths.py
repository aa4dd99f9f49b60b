"""How many bytes of a text each of its tokens stands for, so that a loss can be told of bytes."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from argonne.data.tokens.filters import TokenIds
from argonne.data.tokens.tokenizer import plain_backend

CHARACTERS = 16
"""Of a text, per token that is wanted: several times as many as most have."""


class ByteLengths:
    """Of a tokenizer's tokens.

    A token has the bytes from the end of the token before to its own: white space that a tokenizer leaves out counts to
    the token behind it, and a character that several tokens share to the first of them. So the lengths of a whole text
    add up to its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        # What is put around a text, and where offsets are trimmed, is the post-processor's.
        self._backend = Tokenizer.from_str(json.dumps(json.loads(plain_backend(tokenizer).to_str()) | _NO_PROCESSOR))
        self._backend.encode_special_tokens = True

    def of(self, text: str, ids: TokenIds, wanted: int) -> npt.NDArray[np.int64]:
        """Bytes (UTF-8) of each of the first ``wanted`` of the ``ids`` of a text."""
        wanted = min(wanted, len(ids))
        for characters in (CHARACTERS * wanted, len(text)):
            part = text[:characters]
            encoding = self._backend.encode(part, add_special_tokens=False)
            if encoding.ids[:wanted] == ids[:wanted].tolist():
                break
        else:  # read in other ways than whole; then all are alike
            return _steps(np.linspace(0, len(text.encode()), len(ids) + 1).astype(np.int64))[:wanted]
        ends = np.maximum.accumulate([end for _, end in encoding.offsets[:wanted]])
        if wanted == len(ids):
            part, ends[-1] = text, len(text)
        codes = np.frombuffer(part.encode("utf-32-le", "surrogatepass"), "<u4")
        sizes = 1 + sum((codes >= least).astype(np.int64) for least in (0x80, 0x800, 0x10000))
        before = np.concatenate([[0], np.cumsum(sizes)])
        return _steps(before[np.concatenate([[0], ends])])


def _steps(places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return places[1:] - places[:-1]


_NO_PROCESSOR = {"post_processor": None}
