from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from argonne.data import DataError, SequenceStream, Url, find_shards, fingerprint, is_url, open_shards, read_texts

fsspec = pytest.importorskip("fsspec")

MEMORY = "fsspec+memory://"


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


@pytest.fixture
def copied(memory, shards_of, corpus_of):
    """Three local shards, one of each kind, and their copies in memory."""
    shards = shards_of(corpus_of([[8, 9], [10], [7]], seed=1))
    for shard in shards:
        memory.pipe(f"/corpus/a b/{shard.path.name}", shard.path.read_bytes())
    return shards


def names(patterns: list[str]) -> list[str]:
    return [path.name for path in find_shards(patterns)]


def test_file_urls_are_local_paths(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    for name in ("part-10.arrow", "part-2.arrow", "notes.txt"):
        (folder / name).touch()
    for pattern in (f"file://{folder}/*.arrow", f"file://{tmp_path}/with%20space/*.arrow", f"file://{folder}"):
        found = find_shards([pattern])
        assert found == (folder / "part-2.arrow", folder / "part-10.arrow")
        assert all(isinstance(path, Path) for path in found)


def test_shards_behind_a_url_are_the_same_corpus_as_their_local_copies(copied, tokenizer) -> None:
    paths = find_shards([f"{MEMORY}/corpus/a b/*.bin"])
    assert [path.name for path in paths] == [shard.path.name for shard in copied]
    assert str(paths[0]) == f"{MEMORY}/corpus/a b/{paths[0].name}"
    shards = open_shards(paths)
    assert fingerprint(shards) == fingerprint(copied)
    for remote, local in zip(shards, copied, strict=True):
        for row_group in range(len(local.rows)):
            assert read_texts(remote, row_group) == read_texts(local, row_group)
    here, there = (SequenceStream(each, tokenizer, 30, 2, None, [0, 1]) for each in (copied, shards))
    for step in range(20):
        np.testing.assert_array_equal(here.next_sequence(step % 2).tokens, there.next_sequence(step % 2).tokens)


def test_globs_files_and_directories_behind_a_url(memory) -> None:
    for path in ("2.arrow", "10.arrow", "1.parquet", ".hidden.arrow", "notes.txt", "x[3].arrow"):
        memory.pipe(f"/d/{path}", b"x")
    for path in ("1.arrow", "deep/7.arrow", "deep/.h/8.arrow"):
        memory.pipe(f"/d/sub/{path}", b"x")
    assert names([f"{MEMORY}/d/*.arrow"]) == ["2.arrow", "10.arrow", "x[3].arrow"]
    assert names([f"{MEMORY}/d/?.*"]) == ["1.parquet", "2.arrow"]
    assert names([f"{MEMORY}/d/[12].arrow"]) == ["2.arrow"]
    assert names([f"{MEMORY}/d/*/*.arrow"]) == ["1.arrow"]
    assert names([f"{MEMORY}/d/s*/**/*.arrow"]) == ["1.arrow", "7.arrow"]
    assert names([f"{MEMORY}/d/10.arrow"]) == ["10.arrow"]
    for directory in ("/d", "/d/"):
        assert names([MEMORY + directory]) == ["1.parquet", "2.arrow", "10.arrow", "x[3].arrow"]
    assert names([f"{MEMORY}/d/2.arrow", f"{MEMORY}/d/2*"]) == ["2.arrow"]
    for nothing in ("/d/*.bin", "/none/*.arrow", "/d/none.arrow", "/none"):
        with pytest.raises(DataError, match="no data shards match fsspec"):
            find_shards([MEMORY + nothing])


def test_damage_behind_a_url_is_named(copied, memory) -> None:
    (path, *_) = find_shards([f"{MEMORY}/corpus/a b/*.bin"])
    (shard,) = open_shards([path])
    content = memory.cat(path.key)
    memory.pipe(path.key, content[:-10])
    with pytest.raises(DataError, match=r"row group 1 of shard fsspec\+memory.*the file was changed"):
        read_texts(shard, 1)
    with pytest.raises(DataError, match=r"shard fsspec\+memory.*cannot be read"):
        open_shards([path])
    memory.rm(path.key)
    with pytest.raises(DataError, match=r"shard fsspec\+memory.*cannot be read"):
        open_shards([path])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("foo://bucket/*.parquet", "has the unknown scheme 'foo'; legal: a path, file://, s3://.*fsspec"),
        ("https://host/x.parquet", "has the unknown scheme 'https'"),
        ("memory://d/*.arrow", "has the unknown scheme 'memory'"),
        ("s3:///dir/*.parquet", "names no bucket; legal: s3://bucket/..."),
        ("gs://", "names no bucket"),
        ("hdfs:///dir", "names no host:port"),
        ("file://host/dir/*.parquet", "names a host; legal: file:///path"),
        ("fsspec+nosuchthing:///d", "cannot be listed: "),
    ],
)
def test_a_url_that_is_not_legal_is_refused_at_once_in_one_line(url: str, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        find_shards([url])
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 5


def test_what_is_a_url() -> None:
    assert all(map(is_url, ["s3://b/x", "fsspec+memory:///x", "file:///x"]))
    assert not any(map(is_url, ["/a/b", "a://"[:2], "dir/s3:/x", "c:\\x", "data/*.parquet"]))


def test_a_url_has_a_name_and_reads_as_its_address() -> None:
    url = Url("s3://bucket/dir/part-1.parquet", "s3://bucket/dir/", "bucket/dir/part-1.parquet")
    assert (url.name, str(url)) == ("part-1.parquet", "s3://bucket/dir/part-1.parquet")


def test_a_local_copy_of_a_corpus_with_urls_is_found_by_path_too(copied, tmp_path: Path) -> None:
    for shard in copied:
        shutil.copy(shard.path, tmp_path)
    assert fingerprint(open_shards(find_shards([str(tmp_path / "*.bin")]))) == fingerprint(copied)
