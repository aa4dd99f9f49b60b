"""The checking mode of ``record``: do all ranks issue the same collectives, in the same order?

Before a collective starts, its ranks write to each other through the job's key-value store what they are about to
issue, and go on only when all have written the same. Nothing is ever sent to a rank that is stuck or has gone another
way, so that no one is left hanging.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress

import torch.distributed as dist

from argonne.parallel.communication.layout import ranks_of
from argonne.parallel.errors import CollectiveMismatch

_OUTSIDE = "not yet in the block"
_START = "the start of the block"
_END = "the end of the block"
_GONE = "left the block"
_AGREED = "agreed"
_POLL = 0.002  # seconds between two looks for the messages of the others
_LOOK = 0.05  # seconds between two looks at what keeps them
_EDGE_PATIENCE = 60.0  # seconds: a rank may have much to do before its first and after its last collective


class Agreement:
    """One rank's side of the comparison, inside its ``with`` block; entering and leaving it are collective.

    Keys: ``message/<ranks>/<n>/<rank>`` is what a rank issues as the n-th collective of those ranks;
    ``verdict/<ranks>/<n>`` that they agree, or why they do not; ``report`` the first such reason of all ranks;
    ``at/<rank>`` the latest message of a rank; ``left`` the number of ranks that are through.
    """

    def __init__(self, rank: int, everyone: tuple[int, ...], patience: float) -> None:
        self.rank, self.everyone, self.patience = rank, everyone, patience
        store = dist.distributed_c10d._get_default_store()  # every call here is answered at once
        # Counted in the store: processes may have been in other jobs before, but all enter the same blocks of one.
        block = store.add(f"argonne/agreement/entered/{self.rank}", 1)
        self.store = dist.PrefixStore(f"argonne/agreement/{block}", store)
        self.counts = Counter({self.everyone: -1})  # the start is number 0

    def __enter__(self) -> Agreement:
        self.check(self.everyone, _START, max(self.patience, _EDGE_PATIENCE))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            reason = " ".join(f"{kind.__name__}: {error}".split())[:200]
            with suppress(RuntimeError):  # the store may be gone with the rank that hosts it
                self.store.set(f"at/{self.rank}", f"{_GONE} with {reason}")
            return
        self.check(self.everyone, _END, max(self.patience, _EDGE_PATIENCE))
        last = self.counts.pop(self.everyone)
        for ranks, number in self.counts.items():
            self._forget(ranks, number)
        if self.store.add("left", 1) == len(self.everyone):  # nobody reads any more
            for rank in self.everyone:
                self.store.delete_key(f"message/{self.everyone}/{last}/{rank}")
                self.store.delete_key(f"at/{rank}")
            self.store.delete_key(f"verdict/{self.everyone}/{last}")
            self.store.delete_key("left")

    def check(self, ranks: tuple[int, ...], text: str, patience: float | None = None) -> None:
        """Return when every one of ``ranks`` is about to issue what ``text`` describes; otherwise raise the report."""
        self.counts[ranks] += 1
        number = self.counts[ranks]
        keys = {rank: f"message/{ranks}/{number}/{rank}" for rank in ranks}
        self.store.set(keys[self.rank], text)
        self.store.set(f"at/{self.rank}", text)
        problem = self._wait(keys, self.patience if patience is None else patience)
        if not problem:
            messages = dict(zip(ranks, map(bytes.decode, self.store.multi_get(list(keys.values()))), strict=True))
            problem = _by_message(messages) if len(set(messages.values())) > 1 else None
        # One verdict for all: a rank may give up at the very moment at which the last one comes.
        name = f"collective {number} of {ranks_of(ranks)}"
        verdict = self._first_message(f"verdict/{ranks}/{number}", f"{name}: {problem}" if problem else _AGREED)
        if verdict != _AGREED:
            raise CollectiveMismatch(self._first_message("report", f"the ranks are out of step at {verdict}"))
        self._forget(ranks, number - 1)

    def _wait(self, keys: dict[int, str], patience: float) -> str | None:
        """Wait until every rank has set its key, or return why it is in vain."""
        began = looked = time.monotonic()
        while not self.store.check(list(keys.values())):
            time.sleep(_POLL)
            now = time.monotonic()
            if now - looked < _LOOK:
                continue
            looked = now
            # In this order: a rank that has left and has not set its key will never set it.
            places = self._places()
            missing = [rank for rank, key in keys.items() if not self.store.check([key])]
            gone = [rank for rank in missing if places[rank].startswith((_END, _GONE))]
            if gone:
                return f"{ranks_of(gone)} will not come: {_by_message(places)}"
            if missing and now - began > patience:
                return f"{ranks_of(missing)} did not come within {patience:g} s: {_by_message(places)}"
        return None

    def _places(self) -> dict[int, str]:
        """Where each rank was last."""
        keys = {rank: f"at/{rank}" for rank in self.everyone}
        return {r: self.store.get(key).decode() if self.store.check([key]) else _OUTSIDE for r, key in keys.items()}

    def _first_message(self, key: str, text: str) -> str:
        """Set ``key`` to ``text`` unless another rank was first; what it is set to."""
        return self.store.compare_set(key, "", text).decode()

    def _forget(self, ranks: tuple[int, ...], number: int) -> None:
        """Delete this rank's keys of a collective that all its ranks are through with: they have set a later one."""
        self.store.delete_key(f"message/{ranks}/{number}/{self.rank}")
        if self.rank == ranks[0]:
            self.store.delete_key(f"verdict/{ranks}/{number}")


def _by_message(messages: dict[int, str]) -> str:
    """``ranks 0, 2: this; rank 1: that``."""
    groups: dict[str, list[int]] = {}
    for rank, text in messages.items():
        groups.setdefault(text, []).append(rank)
    return "; ".join(f"{ranks_of(ranks)}: {text}" for text, ranks in groups.items())
