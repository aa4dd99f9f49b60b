"""benchmarks/data_corpus.py: how documents are read out of packages, and what is written; no package is fetched."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from argonne.data import find_shards, open_shards, read_texts
from argonne.parallel import ArgonneError
from benchmarks import data_corpus
from benchmarks.corpus_text import PAGE_CHARACTERS, decode, dictionary, html_text, number, pages, spans, text_files
from benchmarks.data_corpus import MANIFEST, SHARDS, Source, build


def test_numbers_of_an_index_are_in_base_64() -> None:
    assert [number(digits) for digits in ("A", "b", "/", "BA", "BNy", "+8")] == [0, 27, 63, 64, 4978, 4028]


def test_each_entry_is_taken_once_and_descriptions_are_not() -> None:
    index = "00-database-url\tC\tv\n11:00-database-info\tCA\tB\nzebra\tBC\tE\nant\tBA\tC\nemmet\tBA\tC\n"
    assert spans(index) == [(64, 2), (66, 4), (128, 1)]
    assert spans("00databaseurl\tA\tB\nA\tB\tC\tthird column\n") == [(1, 2)]


def test_a_dictionary_is_read_through_its_index(tmp_path: Path) -> None:
    entries = ["about me\n", "ant\n  An insect.\n", "z\xe8bre\n  Un animal.\n"]
    contents = [entry.encode() for entry in entries]
    (tmp_path / "x.dict.dz").write_bytes(gzip.compress(b"".join(contents)))
    # 9 bytes, 17 bytes, 21 bytes
    (tmp_path / "x.index").write_text("00-database-short\tA\tJ\nant\tJ\tR\nz\xe8bre\ta\tV\n", "utf-8")
    assert list(dictionary(tmp_path)) == ["".join(entries[1:])]


def test_short_entries_share_a_page_and_long_ones_have_their_own() -> None:
    short, long = "a" * (PAGE_CHARACTERS // 2), "b" * PAGE_CHARACTERS
    assert list(pages([short, short, long, short])) == [short + short, long, short]
    assert list(pages([])) == []


def test_web_pages_are_read_without_head_scripts_and_navigation() -> None:
    page = """<!DOCTYPE html><html><head><title>T</title><meta charset="utf-8"></head><body>
      <div class="bar" role="navigation">up<div>down</div><br></div> <script>if (a < b) {}</script>
      <h1>Heading</h1><p>One <b>bold</b>\n  word &amp; a&nbsp;link<a href="#">¶</a>.<br>Next</p>
      <pre>x  = 1\n  y</pre><ul><li>first<li>second</ul></body></html>"""
    assert html_text(page) == "Heading\nOne bold word & a link¶.\nNext\nx  = 1\n  y\nfirst\nsecond\n"
    assert html_text("<html><head></head></html>") == ""


def test_text_files_are_read_compressed_or_not(tmp_path: Path) -> None:
    title = "Title\n=====\n\n.. note:: kept as it is\n"
    (tmp_path / "doc" / "b").mkdir(parents=True)
    (tmp_path / "doc" / "b" / "page.rst.gz").write_bytes(gzip.compress(title.encode()))
    (tmp_path / "doc" / "a.rst").write_text("plain\n")
    (tmp_path / "doc" / "README.gz").write_bytes(gzip.compress(b"no suffix\n"))
    (tmp_path / "doc" / "picture.svg").write_text("<svg/>")
    assert list(text_files(tmp_path, "doc", (".rst", ""))) == ["no suffix\n", "plain\n", title]


def test_text_that_is_not_utf8_is_read_as_western() -> None:
    assert decode("d\xe9j\xe0".encode()) == decode("d\xe9j\xe0".encode("cp1252")) == "d\xe9j\xe0"
    assert decode(b"it\x92s") == "it\u2019s"


def test_documents_are_written_once_in_an_order_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"document {number}" for number in range(100)]
    sources = [Source("one", "1.0", texts[:60]), Source("two", "2.0", [*texts[50:], " \n", "d\ud800"])]
    found = build(tmp_path, sources)
    shards = open_shards(find_shards([str(tmp_path)]))
    assert [shard.path.name for shard in shards] == [f"part-{number}.parquet" for number in range(15)]
    assert len(shards) <= SHARDS
    written = [text for shard in shards for text in read_texts(shard, 0)]
    assert sorted(map(str, written)) == sorted([*texts, "d?"])
    assert written == sorted(written, key=lambda text: hashlib.sha256(str(text).encode()).digest())
    whole = b"".join(str(text).encode() + b"\0" for text in written)
    assert found == json.loads((tmp_path / MANIFEST).read_text())
    assert found["sha256"] == hashlib.sha256(whole).hexdigest()
    assert found["documents"] == len(written) == 101
    assert found["bytes"] == len(whole) - 101 == sum(found["shards"].values())
    assert [facts["documents"] for facts in found["packages"].values()] == [60, 41]
    assert pq.ParquetFile(shards[0].path).metadata.row_group(0).column(0).compression == "ZSTD"

    capsys.readouterr()
    assert build(tmp_path, iter(())) == found
    assert "built before" in capsys.readouterr().out


def test_a_machine_without_apt_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ArgonneError, match="apt-get is not on this machine"):
        build(tmp_path / "corpus")
    assert [*(tmp_path / "corpus").iterdir()] == []


def test_a_package_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_corpus, "DEBIAN", {"no-such": dictionary})

    def fail(*command: str, folder: Path | None = None) -> str:
        raise ArgonneError(f"{command[0]} failed: E: Unable to locate package {command[-1]}")

    monkeypatch.setattr(data_corpus, "run", fail)
    monkeypatch.setattr(data_corpus.shutil, "which", lambda program: program)
    with pytest.raises(ArgonneError, match="apt-get failed: E: "):
        build(tmp_path / "corpus")
