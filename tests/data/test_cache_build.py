from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from argonne.data import (
    DataError,
    build_cache,
    find_shards,
    open_shards,
)
from argonne.data.cache import store as cache
from tests.data.files import build, content, spoil

pytestmark = pytest.mark.usefixtures("small_units")


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
    spoil(shards[0].path, 1)
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
import os
import signal
import sys
from pathlib import Path
from argonne.data import build_cache, find_shards, load_tokenizer, open_shards
from argonne.data.cache import build as cache_build
from argonne.data.cache import store as cache

def stop():
    global stopped
    if not stopped and any(Path(directory).glob("*/*.json")):
        stopped = True
        os.killpg(0, signal.SIGSTOP)  # in the middle, however fast or slow the machine is

if __name__ == "__main__":
    corpus, tokenizer, directory, processes = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what runs in its background ignore it
    cache.MIN_UNIT_ROWS, cache_build.TICK_SECONDS, stopped = 100, 0, False
    shards = open_shards(find_shards([corpus]))
    build_cache(shards, load_tokenizer(tokenizer), None, Path(directory), int(processes), tick=stop)
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
    wait_for(lambda: state(killed.pid) in "TZ", 120)
    assert state(killed.pid) == "T"
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


def state(pid: int) -> str:
    """T: stopped; Z: ended."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
