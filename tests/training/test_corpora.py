from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from argonne.training.config import DataFlags
from argonne.training.run.corpora import Corpora
from argonne.training.run.identity import RunIdentity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard, rows in enumerate((5, 7, 9)):
        texts = [f"shard {shard}, row {row}" for row in range(rows)]
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{shard}.parquet")
    return tmp_path


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("accepts", [False, True])
def test_a_shard_that_one_rank_cannot_open_is_the_same_to_all(folder, goes_on, accepts) -> None:
    flags = DataFlags(data_glob=(f"{folder}/*.parquet",), on_bad_shard="skip", accept_data_change=accepts)
    saved = RunIdentity(data=Corpora.open(flags, seed=0).identity) if goes_on else None
    sees_all = Corpora.open(flags, 0, saved)
    (folder / "1.parquet").write_bytes(b"not what it was")
    sees_two = Corpora.open(flags, 0, saved)
    reasons = [dict(sees_two.quarantined[0])]
    assert reasons != [{}] == sees_all.quarantined
    one, other = sees_all.without(reasons), sees_two.without(reasons)
    assert one.identity == other.identity
    assert one.shards == other.shards
    # A run that goes on with the same data keeps the ways of its lanes.
    assert one.shards[1].rows == ((7,) if goes_on and not accepts else ())
