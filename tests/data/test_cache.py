from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from argonne.data import (
    DataError,
    SequenceStream,
    Shard,
    encode,
    open_cache,
    open_shards,
    train_tokenizer,
)
from argonne.data.cache import store as cache
from argonne.data.corpus import row_groups
from argonne.data.tokens.filters import Filters, tokenise_rows
from tests.data.files import build, content, spoil
from tests.data.strategies import boundaries, run, seeds, shapes

pytestmark = pytest.mark.usefixtures("small_units")


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


@run(25)
@given(shapes(9, 5), seeds, boundaries, st.booleans())
def test_the_cache_holds_the_tokens_of_every_accepted_document_in_order_and_finds_each(
    shards_of, corpus_of, tokenizer, tmp_path_factory, shape, seed, boundary, streamed
) -> None:
    corpus = corpus_of(shape, seed)
    with pytest.MonkeyPatch.context() as patch:
        if streamed:  # read piece by piece, as large row groups are
            patch.setattr(row_groups, "STREAMED_BYTES", 0)
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
    shards_of, corpus_of, tokenizer, tmp_path
) -> None:
    shards = shards_of(corpus_of([[12]], seed=6))
    other = train_tokenizer(["another text"])
    paths = [
        build(shards, tokenizer, tmp_path).path,
        build(shards_of(corpus_of([[12]], seed=7)), tokenizer, tmp_path).path,
        build(shards, other, tmp_path).path,
        build(shards, tokenizer, tmp_path, boundary=(0, 2)).path,
    ]
    for filters in (Filters(min_tokens=11), Filters(max_digits=0.6), Filters(min_readable=0), Filters(60)):
        paths.append(build(shards, tokenizer, tmp_path, filters=filters).path)
    assert build(shards, tokenizer, tmp_path, filters=Filters(50, 0.5, 0.3, 10)).path == paths[0]
    assert len({path.name for path in paths}) == len(paths)
    assert all(len(path.name) == 16 and path.parent == tmp_path for path in paths)


def test_a_copy_of_the_corpus_elsewhere_has_the_same_cache(corpus_of, shard_to, tokenizer, tmp_path) -> None:
    paths = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        shard_to(tmp_path / place / "shard.parquet", corpus_of([[9]], seed=8)[0])
        paths.append(build(open_shards([tmp_path / place / "shard.parquet"]), tokenizer, tmp_path / "caches").path)
    assert paths[0] == paths[1]


@run(25)
@given(seeds, st.data())
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


@pytest.mark.parametrize("streamed", [False, True])
def test_a_row_group_that_cannot_be_read_ends_the_build_or_is_counted_as_asked(
    shards_of, corpus_of, tokenizer, tmp_path, capsys, monkeypatch, streamed
) -> None:
    if streamed:
        monkeypatch.setattr(row_groups, "STREAMED_BYTES", 0)
    corpus = corpus_of([[8, 7, 9], [6]], seed=10)
    shards = shards_of(corpus, ["parquet"])
    good = shards[0].path.read_bytes()
    spoil(shards[0].path, 1)
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
