"""Shards with flipped bits, cut short, or with rows of every bad kind."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from argonne.data import (
    BatchStream,
    DataError,
    Encoder,
    LaneState,
    SequenceStream,
    check_block_size,
    open_shard,
    open_shards,
    quarantine,
    quarantined,
    read_texts,
    row_groups,
    served_lanes,
)
from argonne.data.documents import tokenise_rows

PARQUET = list(itertools.product(["none", "snappy", "zstd"], [True, False], ["1.0", "2.0"]))
ARROW = list(itertools.product(["file", "stream"], [None, "lz4", "zstd"], [False, True]))
CASES = 20  # of each of these: 240 damaged files each


def texts(seed: int, groups: int = 3, rows: int = 12) -> list[list[str | None]]:
    source = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "", "zeta\u00e9"]
    return [
        [None if row % 7 == 3 else " ".join(source.choices(words, k=source.randint(0, 9))) for row in range(rows)]
        for _ in range(groups)
    ]


def columns(groups: list[list[str | None]]) -> pa.Table:
    rows = [row for group in groups for row in group]
    return pa.table({"id": range(len(rows)), "text": pa.array(rows, pa.string())})


def parquet_bytes(groups: list[list[str | None]], compression="none", dictionary=True, page="1.0", **more) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        columns(groups),
        sink,
        row_group_size=len(groups[0]),
        compression=compression,
        use_dictionary=dictionary,
        data_page_version=page,
        write_page_checksum=True,
        **{"data_page_size": 100, "write_batch_size": 4, **more},
    )
    return sink.getvalue().to_pybytes()


def arrow_bytes(groups: list[list[str | None]], kind: str, compression: str | None, dictionary: bool) -> bytes:
    table = columns(groups)
    if dictionary:
        table = table.set_column(1, "text", table["text"].dictionary_encode())
    sink = pa.BufferOutputStream()
    options = ipc.IpcWriteOptions(compression=compression)
    with {"file": ipc.new_file, "stream": ipc.new_stream}[kind](sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=len(groups[0]))
    return sink.getvalue().to_pybytes()


def damages(content: bytes, seed: str) -> list[tuple[str, bytes]]:
    """Three flips of one bit for each truncation, at random places."""
    source = random.Random(seed)
    found = []
    for case in range(CASES):
        if case % 4:
            found.append(flipped(content, source.randrange(8 * len(content))))
        else:
            length = source.randrange(len(content))
            found.append((f"cut to {length} of {len(content)} bytes", content[:length]))
    return found


def flipped(content: bytes, bit: int) -> tuple[str, bytes]:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return f"bit {bit} flipped", bytes(damaged)


def outcome(path: Path, content: bytes) -> list[list[object] | None] | None:
    """The texts of each row group, None for one that is refused; None alone where the file is."""
    path.write_bytes(content)
    try:
        shard = open_shard(path)
    except DataError as error:
        return named(error, f"shard {path}")
    found: list[list[object] | None] = []
    for row_group in range(len(shard.rows)):
        try:
            found.append(read_texts(shard, row_group))
        except DataError as error:
            found.append(named(error, f"row group {row_group} of shard {path}"))
    return found


def named(error: DataError, what: str) -> None:
    assert what in str(error)
    assert "\n" not in str(error)


def wrong(found: list[list[object] | None] | None, groups: list[list[str | None]]) -> bool:
    if found is None:
        return False
    return len(found) != len(groups) or any(
        each not in (None, group) for each, group in zip(found, groups, strict=True)
    )


@pytest.mark.parametrize(("compression", "dictionary", "page"), PARQUET)
def test_a_flipped_bit_or_a_truncation_of_parquet_with_checksums_never_gives_a_wrong_text(
    compression, dictionary, page, tmp_path: Path
) -> None:
    groups = texts(seed=1)
    content = parquet_bytes(groups, compression, dictionary, page)
    assert outcome(tmp_path / "shard", content) == groups
    refused = 0
    for what, damaged in damages(content, f"{compression} {dictionary} {page}"):
        found = outcome(tmp_path / "shard", damaged)
        assert not wrong(found, groups), what
        assert found is None or "cut" not in what, what
        refused += found != groups
    assert refused >= CASES // 3  # the rest hit the other column, or what nobody reads


@pytest.mark.slow  # every bit of a small file
@pytest.mark.parametrize(("page", "statistics"), [("1.0", True), ("2.0", False)])
def test_no_bit_of_parquets_headers_and_footer_which_have_no_checksums_changes_a_text_in_silence(
    page, statistics, tmp_path: Path
) -> None:
    groups = texts(seed=2, groups=2, rows=3)
    content = parquet_bytes(groups, "none", False, page, store_schema=False, write_statistics=statistics)
    survived = [
        what
        for bit in range(8 * len(content))
        for what, damaged in [flipped(content, bit)]
        if wrong(outcome(tmp_path / "shard", damaged), groups)
    ]
    assert survived == []


@pytest.mark.parametrize(("kind", "compression", "dictionary"), ARROW)
def test_damaged_arrow_is_refused_or_keeps_its_rows_and_never_ends_the_process(
    kind, compression, dictionary, tmp_path: Path
) -> None:
    groups = texts(seed=3)
    content = arrow_bytes(groups, kind, compression, dictionary)
    assert outcome(tmp_path / "shard", content) == groups
    for what, damaged in damages(content, f"{kind} {compression} {dictionary}"):
        found = outcome(tmp_path / "shard", damaged)
        assert found is None or "cut" not in what, what
        for rows in found or []:  # Arrow has no checksums: texts may differ
            assert rows is None or all(row is None or isinstance(row, str) for row in rows)


def test_offsets_outside_the_data_are_refused_before_they_are_followed(tmp_path: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 4, 1 << 30, 8], np.int32))
    bad = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"textmore")])
    for kind, new in (("file", ipc.new_file), ("stream", ipc.new_stream)):
        with new(tmp_path / kind, pa.schema([("text", pa.string())])) as writer:
            writer.write_batch(pa.record_batch([pa.array(["good"])], ["text"]))
            writer.write_batch(pa.record_batch([bad], ["text"]))
        shard = open_shard(tmp_path / kind)
        assert read_texts(shard, 0) == ["good"]
        with pytest.raises(DataError, match="row group 1 of .* cannot be read: "):
            read_texts(shard, 1)


def test_a_stream_cut_between_two_batches_is_refused(tmp_path: Path) -> None:
    sink = pa.BufferOutputStream()
    writer = ipc.new_stream(sink, columns(texts(4)).schema)
    writer.write_table(columns(texts(4)), max_chunksize=12)
    path = tmp_path / "shard.arrow"
    with path.open("wb") as file:
        file.write(sink.getvalue().to_pybytes())  # the writer is not closed: all batches and no end
    with pytest.raises(DataError, match="has no end marker"):
        open_shard(path)


BAD_ROWS = [
    b"A good text, long enough for ten tokens to be found in it, surely.",
    None,
    b"\xff\xfe not UTF-8, \xc3(",
    b"",
    b"\xf0\x9f\x98\x80 some more text that is good and long enough to be kept.",
    b"w " * (1 << 16),
    b"\x00\x01 controls are characters like any other, and this is long enough.",
]


@pytest.mark.parametrize("column", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()], ids=str)
@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_a_row_group_of_every_bad_row_delivers_the_good_ones(kind, column, tmp_path: Path, tokenizer) -> None:
    large = column in (pa.large_string(), pa.large_binary())
    raw = pa.array(BAD_ROWS, pa.large_binary() if large else pa.binary())
    table = pa.table({"text": raw.view(column)})
    path = tmp_path / "shard"
    if kind == "parquet":
        pq.write_table(table, path, write_page_checksum=True)
    else:
        with {"file": ipc.new_file, "stream": ipc.new_stream}[kind](path, table.schema) as writer:
            writer.write_table(table)
    (shard,) = open_shards([path])
    rows = read_texts(shard, 0)
    assert [None if row is None else row.encode() for row in rows] == [*BAD_ROWS[:2], None, *BAD_ROWS[3:]]
    outcomes = tokenise_rows(rows, Encoder(tokenizer), None)
    reasons = [each if isinstance(each, str) else None for each in outcomes]
    assert reasons == [None, "not_text", "not_text", "empty", None, None, None]


@pytest.mark.parametrize(
    "values",
    [[1, 2], [1.5], [True], [["a"], ["b"]], [{"a": "b"}], pa.array([b"ab"], pa.binary(2)), pa.nulls(3)],
    ids=str,
)
def test_a_column_of_another_type_is_refused(values, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": values}), tmp_path / "shard")
    with pytest.raises(DataError, match="no string column 'text'; its columns: text"):
        open_shard(tmp_path / "shard")


# --- Quarantine -------------------------------------------------------------------------------------------------


def spoil(path: Path, row_group: int) -> None:
    """Flip a bit in the text of one row group of a Parquet shard."""
    content = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(row_group).column(1)
    content[chunk.dictionary_page_offset + chunk.total_compressed_size - 2] ^= 1
    path.write_bytes(content)


def rebuilt(state: LaneState) -> LaneState:
    return LaneState.from_dict(json.loads(json.dumps(state.to_dict())))


BLOCK, LANES = 20, 4


def ranks(shards, tokenizer, size: int, states, sample: int, report=None) -> list[BatchStream]:
    return [
        BatchStream(
            SequenceStream(
                shards, tokenizer, BLOCK, LANES, None, served_lanes(LANES, rank, size), states, "skip", report
            ),
            dp_rank=rank,
            dp_size=size,
            micro_batch=LANES // size,
            accumulation=1,
            start_sample=sample,
        )
        for rank in range(size)
    ]


run = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
shapes = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=3)


@run
@given(shapes, st.integers(0, 10**6), st.data())
def test_damaged_row_groups_give_the_same_samples_and_states_at_any_layout_and_after_any_stop(
    shards_of, corpus_of, tokenizer, shape, seed, data
) -> None:
    corpus = corpus_of(shape, seed)
    shards = shards_of(corpus, ["parquet"])
    everything = [(shard, group) for shard, groups in enumerate(shape) for group in range(len(groups))]
    bad = data.draw(st.sets(st.sampled_from(everything[1:]))) if everything[1:] else set()
    for shard, group in bad:
        spoil(shards[shard].path, group)
    segments = data.draw(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 4])), min_size=1, max_size=4))
    (whole,) = ranks(shards, tokenizer, 1, None, 0)
    states, sample = None, 0
    for steps, size in segments:
        reports: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            if data.draw(st.booleans()):  # read piece by piece, as large row groups are
                patch.setattr(row_groups, "STREAMED_BYTES", 0)
            streams = ranks(shards, tokenizer, size, states, sample, reports.append)
        for _ in range(steps):
            batches = [stream.next_batch() for stream in streams]
            expected = whole.next_batch()
            together = np.stack([batch.tokens[0] for batch in batches], axis=1).reshape(-1, BLOCK + 1)
            np.testing.assert_array_equal(together, expected.tokens[0])
            found = {lane: state for batch in batches for lane, state in batch.states.items()}
            assert found == expected.states
        states, sample = [rebuilt(found[lane]) for lane in range(LANES)], batches[0].step_sample
        assert len(reports) <= size * len(bad)
    assert {pair for state in states for pair in state.unreadable} <= bad


@run
@given(shapes, st.integers(0, 10**6), st.integers(1, 4), st.data())
def test_documents_and_drops_account_for_every_row_and_each_bad_row_group_is_reported_once(
    shards_of, corpus_of, tokenizer, shape, seed, lanes, data
) -> None:
    shards = shards_of(corpus_of(shape, seed), ["parquet"])
    everything = [(shard, group) for shard, groups in enumerate(shape) for group in range(len(groups))]
    bad = data.draw(st.sets(st.sampled_from(everything[1:]))) if everything[1:] else set()
    for shard, group in bad:
        spoil(shards[shard].path, group)
    reports: list[str] = []
    stream = SequenceStream(shards, tokenizer, 1, lanes, None, range(lanes), on_bad="skip", report=reports.append)
    rows = unreadable = 0
    for lane in range(lanes):
        before = state = stream.state(lane)
        while state.position.epoch < lanes:  # a lane meets every row in as many epochs
            before = state
            stream.next_sequence(lane)
            state = stream.state(lane)
        plan_rows = sum(map(sum, shape))
        # The last sequence may have gone on into the next pass.
        low = before.documents + sum(before.dropped.values())
        high = state.documents + sum(state.dropped.values())
        assert low <= plan_rows <= high
        assert set(state.unreadable) == bad
        rows += high
        unreadable += state.dropped.get("unreadable", 0)
    assert unreadable >= lanes * sum(shape[shard][group] for shard, group in bad)
    assert len(reports) == len(bad)
    for shard, group in bad:
        (line,) = [line for line in reports if f"row group {group} of shard {shards[shard].path} " in line]
        assert line.endswith(f"its {shape[shard][group]:,} rows are passed over (--on-bad-shard skip)")
        assert "\n" not in line


def test_by_default_a_bad_row_group_stops_the_run_and_is_named(shards_of, corpus_of, tokenizer) -> None:
    shards = shards_of(corpus_of([[8], [8, 8]], 1), ["parquet"])
    spoil(shards[1].path, 1)
    stream = SequenceStream(shards, tokenizer, BLOCK, 1, None, [0])
    with pytest.raises(DataError, match=f"row group 1 of shard {shards[1].path} cannot be read"):
        all(stream.next_sequence(0) for _ in range(1000))
    assert stream.state(0).unreadable == ()


def test_what_a_lane_could_not_read_stays_quarantined_for_it_when_it_becomes_readable(
    shards_of, corpus_of, tokenizer
) -> None:
    shards = shards_of(corpus_of([[8], [8], [8]], 2, rejected=0), ["parquet"])
    whole_file = shards[1].path.read_bytes()
    spoil(shards[1].path, 0)
    arguments = (shards, tokenizer, BLOCK, 1, None, [0])
    stream = SequenceStream(*arguments, on_bad="skip")
    while not stream.state(0).unreadable:
        stream.next_sequence(0)
    shards[1].path.write_bytes(whole_file)
    for on_bad in ("skip", "raise"):
        resumed = SequenceStream(*arguments, [rebuilt(stream.state(0))], on_bad)
        for _ in range(60):
            np.testing.assert_array_equal(stream.next_sequence(0).tokens, resumed.next_sequence(0).tokens)
            assert stream.state(0) == resumed.state(0)


def test_a_document_that_was_begun_and_can_no_longer_be_read_is_passed_over(shards_of, corpus_of, tokenizer) -> None:
    shards = shards_of(corpus_of([[4], [4]], 3, rejected=0), ["parquet"])
    arguments = (shards, tokenizer, BLOCK, 1, None, [0])
    stream = SequenceStream(*arguments)
    stream.next_sequence(0)
    state = stream.state(0)
    assert state.position.token
    spoil(shards[0].path, 0)
    resumed = SequenceStream(*arguments, [state], "skip")
    resumed.next_sequence(0)
    assert resumed.state(0).dropped == {"unreadable": 4 - state.documents}
    assert resumed.state(0).unreadable == ((0, 0),)
    assert resumed.state(0).position.shard == 1
    with pytest.raises(DataError, match="row group 0 of .* cannot be read"):
        SequenceStream(*arguments, [state]).next_sequence(0)


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_corpus_of_which_nothing_can_be_read_is_refused_with_counts(lanes, shards_of, corpus_of, tokenizer) -> None:
    shards = shards_of(corpus_of([[8], [8]], 4), ["parquet"])
    for shard in shards:
        spoil(shard.path, 0)
    stream = SequenceStream(shards, tokenizer, BLOCK, lanes, None, range(lanes), on_bad="skip")
    with pytest.raises(DataError, match="no usable documents in the data; rows dropped: unreadable 16$"):
        stream.next_sequence(0)
    with pytest.raises(DataError, match="unreadable 16$"):
        check_block_size(shards, tokenizer, BLOCK, on_bad="skip")


def test_a_shard_that_cannot_be_opened_keeps_its_place_without_rows(shards_of, corpus_of, tokenizer, tmp_path) -> None:
    good = shards_of(corpus_of([[8], [8]], 5))
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and nothing else")
    paths = [good[0].path, broken, good[1].path, tmp_path / "missing.arrow"]
    with pytest.raises(DataError, match="shard .*broken.parquet cannot be read"):
        open_shards(paths)
    shards = open_shards(paths, on_bad="skip")
    assert [shard.rows for shard in shards] == [(8,), (), (8,), ()]
    assert sorted(quarantined(shards)) == [1, 3]
    assert quarantined(shards)[1].startswith("cannot be read: ")
    stream = SequenceStream(shards, tokenizer, BLOCK, 2, None, range(2))
    plain = SequenceStream(good, tokenizer, BLOCK, 2, None, range(2))
    for step in range(20):
        np.testing.assert_array_equal(stream.next_sequence(step % 2).tokens, plain.next_sequence(step % 2).tokens)
    with pytest.raises(DataError, match=r"none of the 2 data shards can be read; shard .*broken.parquet cannot be"):
        open_shards(paths[1::2], on_bad="skip")


def test_ranks_agree_once_each_quarantines_what_any_of_them_could_not_open(shards_of, corpus_of) -> None:
    shards = shards_of(corpus_of([[8], [8], [8]], 6))
    here, there = quarantine(shards, {0: "is missing"}), quarantine(shards, {2: "is empty (0 bytes)"})
    union = {**quarantined(here), **quarantined(there)}
    assert quarantine(here, union) == quarantine(there, union)
    assert [shard.rows for shard in quarantine(here, union)] == [(), (8,), ()]
    assert [shard.rows for shard in quarantine(shards, union, keep_rows=True)] == [(8,)] * 3
    with pytest.raises(DataError, match="none of the 3 data shards can be read"):
        quarantine(shards, dict.fromkeys(range(3), "is missing"))
    with pytest.raises(DataError, match="row group 0 of shard .* cannot be read: the shard is missing"):
        read_texts(quarantine(shards, {1: "is missing"}, keep_rows=True)[1], 0)
