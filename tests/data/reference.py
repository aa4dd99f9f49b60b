"""The data pipeline by its definition, with the whole corpus in memory and nothing clever."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from argonne.data import DataPosition, encode
from argonne.data.tokens.filters import rejection


class Reference:
    """The definition of a lane, with the whole corpus in memory and nothing clever."""

    def __init__(self, corpus, tokenizer, lanes: int, boundary) -> None:
        groups = [
            [(shard, group, row, text) for row, text in enumerate(rows)]
            for shard, row_groups in enumerate(corpus)
            for group, rows in enumerate(row_groups)
            if rows
        ]
        if len(groups) < 4 * lanes:
            size = ceil(sum(map(len, groups)) / (4 * lanes))
            groups = [rows[at : at + size] for rows in groups for at in range(0, len(rows), size)]
        self.units = groups
        self.lanes = lanes
        self.tokenizer = tokenizer
        self.boundary = boundary

    def outcome(self, text: object) -> str | list[int]:
        if reason := rejection(text):
            return reason
        ids = encode(self.tokenizer, [text])[0].tolist()
        bos, eos = ([self.boundary[0]], [self.boundary[1]]) if self.boundary else ([], [])
        return "short" if len(ids) < 10 else bos + ids + eos

    def rows(self, lane: int) -> Iterator[tuple[DataPosition, str | list[int]]]:
        outcomes = {row: self.outcome(row[3]) for unit in self.units for row in unit}
        for epoch in range(1000):
            for unit in range((lane + epoch) % self.lanes, len(self.units), self.lanes):
                for row in self.units[unit]:
                    yield DataPosition(epoch, *row[:3]), outcomes[row]
