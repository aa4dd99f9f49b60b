"""Files of JSON lines are each counted by one rank, which tells the others: of texts, and of conversations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

from argonne.data.corpus import line_files
from argonne.parallel import Layout, ProcessGroups
from argonne.training.config import DataFlags
from argonne.training.run import line_counts
from argonne.training.run.line_counts import share_counts
from argonne.training.tuning.config import ChatFlags
from tests.pool import RankPool

TEXTS = [{"text": f"text {number}"} for number in range(7)]
CHATS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 5


def counts(groups: ProcessGroups, flags: DataFlags) -> tuple[list[str], dict[str, Sequence[int]]]:
    """The files that this rank counted, and what it knows in the end."""
    with mock.patch.dict(line_files._counts, clear=True):
        counting = mock.patch.object(line_counts, "open_shard", wraps=line_counts.open_shard)
        with counting as opened:
            share_counts(flags, groups)
        known = {Path(key[0]).name: rows for key, rows in line_files._counts.items()}
    return [call.args[0].name for call in opened.call_args_list], known


@pytest.mark.parametrize(("kind", "rows"), [(DataFlags, TEXTS), (ChatFlags, CHATS)])
def test_each_file_is_counted_by_one_rank_and_known_to_all(
    ranks: RankPool, tmp_path: Path, kind: type[DataFlags], rows: list[dict[str, object]]
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[number:]))
    flags = kind(data_glob=(f"{tmp_path}/*.jsonl",))
    told = ranks.run(Layout(data=2), counts, flags)
    assert sorted(name for own, _ in told for name in own) == ["0.jsonl", "1.jsonl", "2.jsonl"]
    for _, known in told:
        assert known == {f"{number}.jsonl": (len(rows) - number,) for number in range(3)}
