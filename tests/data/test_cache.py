from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from argonne.data import (
    DataError,
    SequenceStream,
    Shard,
    build_cache,
    cache,
    encode,
    find_shards,
    open_cache,
    open_shards,
    train_tokenizer,
)
from argonne.data.documents import FILTERS, tokenise_rows

run = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
shapes = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=3).filter(
    lambda shards: all(map(sum, shards))
)


@pytest.fixture(autouse=True)
def small_units(monkeypatch) -> None:
    monkeypatch.setattr(cache, "MIN_UNIT_ROWS", 6)
    monkeypatch.setattr(cache, "OPEN_UNITS", 2)


def content(path: Path) -> dict[str, bytes]:
    """Everything a cache is made of."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != ".lock"}


def accepted(corpus, tokenizer, boundary) -> list[tuple[tuple[int, int, int], list[int]]]:
    """Every document: its shard, row group and row, and its ids, encoded one by one."""
    found = []
    for shard, groups in enumerate(corpus):
        for group, texts in enumerate(groups):
            for row, text in enumerate(texts):
                (outcome,) = tokenise_rows([text], lambda batch: encode(tokenizer, batch), boundary)
                if not isinstance(outcome, str):
                    found.append(((shard, group, row), outcome.tolist()))
    return found


def build(shards, tokenizer, directory: Path, **others):
    return build_cache(shards, tokenizer, others.pop("boundary", None), directory, progress=False, **others)


@run
@given(shapes, st.integers(0, 10**6), st.sampled_from([None, (0, 2)]))
def test_the_cache_holds_the_tokens_of_every_accepted_document_in_order_and_finds_each(
    shards_of, corpus_of, tokenizer, tmp_path_factory, shape, seed, boundary
) -> None:
    corpus = corpus_of(shape, seed)
    built = build(shards_of(corpus), tokenizer, tmp_path_factory.mktemp("caches"), boundary=boundary)
    expected = accepted(corpus, tokenizer, boundary)
    whole, ended = built.read(0, built.tokens)
    assert whole.tokens.tolist() == [token for _, ids in expected for token in ids]
    assert whole.documents.tolist() == [number for number, (_, ids) in enumerate(expected) for _ in ids]
    assert ended == built.documents == len(expected)
    assert sum(built.dropped.values()) == sum(map(sum, shape)) - len(expected)
    places = [(*place, token) for place, ids in expected for token in range(len(ids))]
    assert [built.position(start) for start in range(built.tokens)] == places


def test_the_cache_drops_what_streaming_drops(shards_of, corpus_of, tokenizer, tmp_path) -> None:
    shards = shards_of(corpus_of([[30, 20], [15]], seed=3, rejected=0.6))
    built = build(shards, tokenizer, tmp_path)
    stream = SequenceStream(shards, tokenizer, 1, 1, None, [0])
    dropped: Counter[str] = Counter()
    while stream.state(0).position.epoch == 0:
        dropped = Counter(stream.state(0).dropped)
        stream.next_sequence(0)
    # Rows behind the last document are passed over with the first of the next epoch.
    assert not Counter(built.dropped) < dropped
    assert set(built.dropped) >= set(dropped)
    assert sum(built.dropped.values()) + built.documents == 65


def test_ids_take_two_bytes_where_the_largest_fits_and_four_where_not(shards_of, tmp_path) -> None:
    words = {f"wording{number}": number for number in range(65_535)}
    for largest, dtype in ((65_535, "<u2"), (65_536, "<u4")):
        backend = Tokenizer(models.WordLevel({"<unk>": largest, **words}, "<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        text = " ".join(["wording3"] * 5 + ["unknown"] * 5)
        built = build(shards_of([[[text]]]), PreTrainedTokenizerFast(tokenizer_object=backend), tmp_path)
        assert built.dtype == np.dtype(dtype)
        assert built.read(0, 10)[0].tokens.tolist() == [3] * 5 + [largest] * 5


def test_units_are_runs_of_row_groups_within_a_shard_and_keep_each_group_whole() -> None:
    rows = [(3, 3, 1, 20, 0, 2), (2,)]
    shards = [Shard(Path(f"{index}.parquet"), groups, 1, "Parquet file") for index, groups in enumerate(rows)]
    spans = [(span.shard, span.first, span.rows) for span in cache.cut_spans(shards)]
    assert spans == [(0, 0, (3, 3)), (0, 2, (1,)), (0, 3, (20,)), (0, 4, (0, 2)), (1, 0, (2,))]


def test_a_complete_cache_is_opened_and_not_touched(shards_of, corpus_of, tokenizer, tmp_path) -> None:
    shards = shards_of(corpus_of([[20, 20]], seed=5))
    first = build(shards, tokenizer, tmp_path)
    times = {file.name: file.stat().st_mtime_ns for file in first.path.iterdir()}
    for shard in shards:
        shard.path.unlink()
    second = build(shards, tokenizer, tmp_path)
    assert {file.name: file.stat().st_mtime_ns for file in second.path.iterdir()} == times
    assert second.fingerprint == first.fingerprint == open_cache(first.path, verify=True).fingerprint


def test_data_tokenizer_boundary_and_filters_have_caches_of_their_own(
    shards_of, corpus_of, tokenizer, tmp_path, monkeypatch
) -> None:
    shards = shards_of(corpus_of([[12]], seed=6))
    other = train_tokenizer(["another text"])
    paths = [
        build(shards, tokenizer, tmp_path).path,
        build(shards_of(corpus_of([[12]], seed=7)), tokenizer, tmp_path).path,
        build(shards, other, tmp_path).path,
        build(shards, tokenizer, tmp_path, boundary=(0, 2)).path,
    ]
    monkeypatch.setitem(FILTERS, "min_tokens", 11)
    paths.append(build(shards, tokenizer, tmp_path).path)
    assert len({path.name for path in paths}) == len(paths)
    assert all(len(path.name) == 16 and path.parent == tmp_path for path in paths)


def test_a_copy_of_the_corpus_elsewhere_has_the_same_cache(corpus_of, shard_to, tokenizer, tmp_path) -> None:
    paths = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        shard_to(tmp_path / place / "shard.parquet", corpus_of([[9]], seed=8)[0])
        paths.append(build(open_shards([tmp_path / place / "shard.parquet"]), tokenizer, tmp_path / "caches").path)
    assert paths[0] == paths[1]


@run
@given(st.integers(0, 10**6), st.data())
def test_whatever_is_missing_or_damaged_is_made_again_and_that_alone(
    shards_of, corpus_of, tokenizer, tmp_path_factory, seed, data
) -> None:
    shards = shards_of(corpus_of([[7, 8, 9], [10, 6]], seed))
    built = build(shards, tokenizer, tmp_path_factory.mktemp("caches"))
    whole = content(built.path)
    (built.path / "index.json").unlink()
    hit = set()
    for _ in range(data.draw(st.integers(1, 3))):
        unit = data.draw(st.sampled_from(built.units)).span.name
        file = built.path / f"{unit}.{data.draw(st.sampled_from(['bin', 'json']))}"
        if not file.exists() or not file.stat().st_size:
            continue
        hit.add(unit)
        how = data.draw(st.sampled_from(["flip", "cut", "remove", "lengthen"]))
        old = file.read_bytes()
        at = data.draw(st.integers(0, len(old) - 1))
        if how == "remove":
            file.unlink()
        else:
            flipped = bytes([*old[:at], old[at] ^ 1 << data.draw(st.integers(0, 7)), *old[at + 1 :]])
            file.write_bytes({"flip": flipped, "cut": old[:at], "lengthen": old + b"}"}[how])
    (built.path / "00000-000000.bin.tmp").write_bytes(b"left by a kill")
    before = {file.name: file.stat().st_ino for file in built.path.iterdir()}
    again = build(shards, tokenizer, built.path.parent)
    assert content(again.path) == whole
    for unit in built.units:
        if unit.span.name not in hit:
            assert (again.path / f"{unit.span.name}.bin").stat().st_ino == before[f"{unit.span.name}.bin"]


def test_a_complete_cache_with_a_file_cut_short_is_mended_and_with_a_bit_flipped_found_by_verifying(
    shards_of, corpus_of, tokenizer, tmp_path
) -> None:
    shards = shards_of(corpus_of([[8, 9, 9]], seed=9))
    built = build(shards, tokenizer, tmp_path)
    whole = content(built.path)
    file = built.path / f"{built.units[1].span.name}.bin"
    file.write_bytes(whole[file.name][:-1])
    with pytest.raises(DataError, match=f"{file.name} of token cache .* is damaged"):
        open_cache(built.path)
    assert content(build(shards, tokenizer, tmp_path).path) == whole
    file.write_bytes(bytes([whole[file.name][0] ^ 4]) + whole[file.name][1:])
    open_cache(built.path)
    with pytest.raises(DataError, match=f"{file.name} of token cache .* is damaged"):
        open_cache(built.path, verify=True)
    (built.path / "index.json").unlink()
    with pytest.raises(DataError, match="is not complete; it must be built first"):
        open_cache(built.path)
    assert content(build(shards, tokenizer, tmp_path).path) == whole


def damage_row_group(path: Path, group: int) -> None:
    with pq.ParquetFile(path) as parquet:
        column = parquet.metadata.row_group(group).column(1)
    with path.open("r+b") as file:
        start = column.dictionary_page_offset or column.data_page_offset
        file.seek(start + column.total_compressed_size // 2)
        file.write(b"\xff\x00\xff\x00")


def test_a_row_group_that_cannot_be_read_ends_the_build_or_is_counted_as_asked(
    shards_of, corpus_of, tokenizer, tmp_path, capsys
) -> None:
    corpus = corpus_of([[8, 7, 9], [6]], seed=10)
    shards = shards_of(corpus, ["parquet"])
    good = shards[0].path.read_bytes()
    damage_row_group(shards[0].path, 1)
    for _ in range(2):
        with pytest.raises(DataError, match=r"row group 1 of shard .* cannot be read: ") as caught:
            build(shards, tokenizer, tmp_path)
        assert "\n" not in str(caught.value)
    built = build(shards, tokenizer, tmp_path, on_bad="skip")
    assert built.dropped["unreadable"] == 7
    assert [(unit.span.first, unit.unreadable) for unit in built.units if unit.unreadable] == [(1, (1,))]
    assert "row group 1 of shard" in capsys.readouterr().err
    index = json.loads((built.path / "index.json").read_text())
    assert index["dropped"]["unreadable"] == 7
    remaining = [ids for place, ids in accepted(corpus, tokenizer, None) if place[:2] != (0, 1)]
    assert built.read(0, built.tokens)[0].tokens.tolist() == [token for ids in remaining for token in ids]
    assert build(shards, tokenizer, tmp_path, on_bad="skip").fingerprint == built.fingerprint
    assert not capsys.readouterr().err

    with pytest.raises(DataError, match="row group 1"):
        build(shards, tokenizer, tmp_path)
    shards[0].path.write_bytes(good)
    mended = build(shards, tokenizer, tmp_path)
    assert mended.read(0, mended.tokens)[0].tokens.tolist() == [
        token for _, ids in accepted(corpus, tokenizer, None) for token in ids
    ]


def test_a_corpus_of_unreadable_or_rejected_rows_alone_makes_an_empty_cache(shards_of, tokenizer, tmp_path) -> None:
    shards = shards_of([[[None, "", "tiny"], ["1" * 60]]])
    built = build(shards, tokenizer, tmp_path)
    assert (built.tokens, built.documents) == (0, 0)
    assert dict(built.dropped) == {"not_text": 1, "empty": 1, "short": 1, "digits": 1}


def test_what_cannot_be_written_is_said_in_one_line_and_leaves_no_part_behind(
    shards_of, corpus_of, tokenizer, tmp_path
) -> None:
    shards = shards_of(corpus_of([[20]], seed=11))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="token cache .* cannot be written: .*Not a directory"):
        build(shards, tokenizer, tmp_path / "file")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(DataError, match="token cache .* cannot be written: .*File too large") as caught:
            build(shards, tokenizer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert [file.name for path in tmp_path.glob("*/") for file in path.iterdir()] == [".lock"]
    build(shards, tokenizer, tmp_path)


def test_what_the_tick_raises_ends_the_build_and_the_next_call_takes_it_up(
    shards_of, corpus_of, tokenizer, tmp_path
) -> None:
    shards = shards_of(corpus_of([[8] * 6], seed=12))
    expected = content(build(shards, tokenizer, tmp_path / "whole").path)
    ticks = []

    def tick() -> None:
        ticks.append(threading.current_thread())
        raise TimeoutError("the queue's limit is near")

    with pytest.raises(TimeoutError):
        build(shards, tokenizer, tmp_path / "parts", tick=tick)
    assert ticks == [threading.current_thread()]
    assert content(build(shards, tokenizer, tmp_path / "parts").path) == expected


def test_progress_is_a_few_lines_where_there_is_no_terminal(shards_of, corpus_of, tokenizer, tmp_path, capsys) -> None:
    shards = shards_of(corpus_of([[30]], seed=13))
    built = build_cache(shards, tokenizer, None, tmp_path)
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"tokenising 30 rows, once, into {built.path}"
    assert last == f"30 of 30 rows tokenised: {built.documents} documents, {built.tokens:,} tokens"
    build_cache(shards, tokenizer, None, tmp_path)
    assert capsys.readouterr().out == ""


def test_two_builders_of_one_cache_take_turns_and_the_second_finds_it_complete(
    shards_of, corpus_of, tokenizer, tmp_path, capsys
) -> None:
    shards = shards_of(corpus_of([[30]], seed=14))
    waiting = threading.Event()
    results = []

    def first_tick() -> None:
        if not results:
            results.append(
                threading.Thread(target=lambda: results.append(build(shards, tokenizer, tmp_path, tick=waiting.set)))
            )
            results[0].start()
            assert waiting.wait(10)

    built = build(shards, tokenizer, tmp_path, tick=first_tick)
    results[0].join(10)
    assert results[1].fingerprint == built.fingerprint
    assert "is being built by another process; waiting for it" in capsys.readouterr().out


def children() -> list:
    return [process for process in multiprocessing.active_children() if process.name == "argonne-tokenise"]


@pytest.mark.slow
def test_the_files_are_the_same_bytes_from_one_process_or_two_also_driven_from_a_thread(
    shards_of, corpus_of, tokenizer, tmp_path
) -> None:
    shards = shards_of(corpus_of([[20, 7, 30], [0, 40], [3]], seed=15))
    one = build(shards, tokenizer, tmp_path / "1", boundary=(0, 2))
    results = []
    thread = threading.Thread(
        target=lambda: results.append(build(shards, tokenizer, tmp_path / "2", boundary=(0, 2), processes=2))
    )
    thread.start()
    thread.join(60)
    assert content(results[0].path) == content(one.path)
    assert children() == []


@pytest.mark.slow
def test_a_row_group_that_cannot_be_read_means_the_same_in_processes_of_its_own(
    shards_of, corpus_of, tokenizer, tmp_path, capsys
) -> None:
    shards = shards_of(corpus_of([[8, 7, 9], [6]], seed=10), ["parquet"])
    damage_row_group(shards[0].path, 1)
    with pytest.raises(DataError, match=r"^row group 1 of shard .* cannot be read: [^\n]*$"):
        build(shards, tokenizer, tmp_path / "2", processes=2)
    assert children() == []
    built = build(shards, tokenizer, tmp_path / "2", processes=2, on_bad="skip")
    assert "row group 1 of shard" in capsys.readouterr().err
    assert content(built.path) == content(build(shards, tokenizer, tmp_path / "1", on_bad="skip").path)


@pytest.mark.slow
def test_a_process_killed_from_outside_ends_the_build_with_one_line_and_it_goes_on_later(
    shards_of, corpus_of, tokenizer, tmp_path
) -> None:
    shards = shards_of(corpus_of([[20] * 4], seed=16))
    killed = []

    def tick() -> None:
        if not killed:
            killed.append(children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(DataError, match=r"was killed by signal 9.*the same command goes on where it stopped$"):
        build(shards, tokenizer, tmp_path / "parts", processes=2, tick=tick)
    assert children() == []
    again = build(shards, tokenizer, tmp_path / "parts", processes=2)
    assert content(again.path) == content(build(shards, tokenizer, tmp_path / "whole").path)


SCRIPT = """
import sys
from pathlib import Path
from argonne.data import build_cache, cache, find_shards, load_tokenizer, open_shards

if __name__ == "__main__":
    corpus, tokenizer, directory, processes = sys.argv[1:]
    cache.MIN_UNIT_ROWS = 100
    shards = open_shards(find_shards([corpus]))
    build_cache(shards, load_tokenizer(tokenizer), None, Path(directory), int(processes))
"""
LARGE_UNITS = 24


@pytest.fixture(scope="module")
def large_corpus(shard_to, tokenizer, tmp_path_factory) -> Path:
    """Takes seconds to tokenise: `corpus`, `tokenizer` and `build.py` in one folder."""
    folder = tmp_path_factory.mktemp("large")
    source = random.Random(17)
    words = ["baba", "condri", "elfan", "goist", "hulo", "mennor", "tira", "selka"]
    groups = [[" ".join(source.choices(words, k=400)) for _ in range(100)] for _ in range(LARGE_UNITS)]
    (folder / "corpus").mkdir()
    shard_to(folder / "corpus" / "shard.parquet", groups)
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "build.py").write_text(SCRIPT)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "sent"), [(1, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGINT)])
def test_a_build_that_is_killed_leaves_no_process_behind_and_goes_on_where_it_stopped(
    large_corpus, tokenizer, tmp_path, monkeypatch, processes, sent
) -> None:
    arguments = [large_corpus / "build.py", large_corpus / "corpus", large_corpus / "tokenizer", tmp_path, processes]
    killed = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: list(tmp_path.glob("*/*.json")) or killed.poll() is not None, 120)
    os.killpg(killed.pid, signal.SIGSTOP)  # however fast it is, it is in the middle
    assert killed.poll() is None
    workers = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    assert len(workers) >= processes - (processes == 1)
    if sent == signal.SIGINT:
        os.killpg(killed.pid, sent)  # as the terminal does
    else:
        killed.send_signal(sent)
    os.killpg(killed.pid, signal.SIGCONT)
    _, errors = killed.communicate(timeout=60)
    assert killed.returncode != 0
    assert errors.count("Traceback") == (sent == signal.SIGINT), errors
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 30)
    (path,) = tmp_path.iterdir()
    made = {file.name: file.stat().st_ino for file in path.glob("*.json")}
    assert 1 <= len(made) < LARGE_UNITS
    assert "index.json" not in made

    monkeypatch.setattr(cache, "MIN_UNIT_ROWS", 100)
    shards = open_shards(find_shards([str(large_corpus / "corpus")]))
    again = build(shards, tokenizer, tmp_path)
    assert again.path == path
    assert {name: (path / name).stat().st_ino for name in made} == made
    assert content(path) == content(build(shards, tokenizer, tmp_path / "whole").path)


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
