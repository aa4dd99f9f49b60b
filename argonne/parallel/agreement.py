"""The checking mode of ``record``: do all ranks issue the same collectives, in the same order?

Before a collective starts, its ranks tell each other through a key-value store what they are about to issue,
and go on only when all say the same. The store has connections of its own, so that a rank which is stuck, or
has gone another way, leaves no one hanging.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from argonne.parallel.errors import CollectiveMismatch

if TYPE_CHECKING:
    from argonne.parallel.groups import ProcessGroups
    from argonne.parallel.recording import Collective

_END = "the end of the block"
_POLL = 0.002  # seconds between two looks at the store


class Agreement:
    """One rank's side of the comparison. Construction and ``finish`` are collective over all ranks.

    Keys: ``said/<ranks>/<n>/<rank>`` is what a rank issues as the n-th collective of those ranks, ``at/<rank>``
    the latest thing it said, ``left/<rank>`` that it reads no more, and ``report`` the difference once found.
    """

    def __init__(self, groups: ProcessGroups, patience: float) -> None:
        self.rank, self.size, self.patience = groups.world.rank, groups.world.size, patience
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        timeout = timedelta(seconds=max(patience, 5.0))
        port = [0]
        if self.rank == 0:
            self.store = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
            port = [self.store.port]
        dist.broadcast_object_list(port, src=0)
        if self.rank != 0:
            self.store = dist.TCPStore(host, port[0], is_master=False, timeout=timeout, wait_for_workers=False)
        self.counts: Counter[tuple[int, ...]] = Counter()

    def check(self, entry: Collective) -> None:
        """Return when every rank of ``entry`` is about to issue the same; otherwise raise the report."""
        self.counts[entry.ranks] += 1
        number = self.counts[entry.ranks]
        prefix = f"said/{entry.ranks}"
        self.store.set(f"at/{self.rank}", str(entry))
        self.store.set(f"{prefix}/{number}/{self.rank}", str(entry))
        self._await([f"{prefix}/{number}/{rank}" for rank in entry.ranks], entry.ranks, self.patience)
        said = {rank: self.store.get(f"{prefix}/{number}/{rank}").decode() for rank in entry.ranks}
        if len(set(said.values())) > 1:
            self._report(f"collective {number} of ranks {_listed(entry.ranks)} differs: {_who_says_what(said)}")
        if number > 1:  # whoever says its n-th has read all of n - 1
            self.store.delete_key(f"{prefix}/{number - 1}/{self.rank}")

    def finish(self) -> None:
        """Return when every rank has reached the end of its block; otherwise raise the report."""
        self.store.set(f"said/end/{self.rank}", _END)
        self.store.set(f"at/{self.rank}", _END)
        # A rank may have much to do after its last collective; one that waits for us reports it itself.
        self._await([f"said/end/{rank}" for rank in range(self.size)], range(self.size), max(self.patience, 60.0))

    def close(self) -> None:
        """Leave; the rank that serves the store lets the others read the report first."""
        try:
            self.store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                self.store.wait([f"left/{rank}" for rank in range(self.size)], timedelta(seconds=2 * self.patience))
        except (dist.DistError, RuntimeError):
            return  # the others are gone, or stuck: what there is to say has been said

    def _await(self, keys: list[str], ranks: range | tuple[int, ...], patience: float) -> None:
        """Wait for all ``keys``, one of each of ``ranks``, or raise the report."""
        began = time.monotonic()
        while not self.store.check(keys):
            # In this order: a rank that is at the end and has not said the key will never say it.
            places = self._places()
            missing = [rank for rank, key in zip(ranks, keys, strict=True) if not self.store.check([key])]
            late = time.monotonic() - began > patience
            if missing and (late or any(places[rank] == _END for rank in missing)):
                why = f"did not come within {patience:g} s" if late else "will not come"
                self._report(f"rank{'s' * (len(missing) > 1)} {_listed(missing)} {why}: {_who_says_what(places)}")
            if self.store.check(["report"]):
                raise CollectiveMismatch(self.store.get("report").decode())
            time.sleep(_POLL)

    def _places(self) -> dict[int, str]:
        """Where each rank was last."""
        keys = [f"at/{rank}" for rank in range(self.size)]
        return {
            rank: self.store.get(key).decode() if self.store.check([key]) else "the start of the block"
            for rank, key in enumerate(keys)
        }

    def _report(self, text: str) -> None:
        """Raise the report that all ranks raise: the first one made."""
        agreed = self.store.compare_set("report", "", f"the ranks' collectives differ. {text}")
        raise CollectiveMismatch(agreed.decode() if isinstance(agreed, bytes) else agreed)


def _who_says_what(said: dict[int, str]) -> str:
    """``ranks 0, 2: this; rank 1: that``."""
    groups: dict[str, list[int]] = {}
    for rank, text in said.items():
        groups.setdefault(text, []).append(rank)
    return "; ".join(f"rank{'s' * (len(r) > 1)} {_listed(r)}: {text}" for text, r in groups.items())


def _listed(ranks: range | tuple[int, ...] | list[int]) -> str:
    return ", ".join(map(str, ranks))
