"""A store that the processes of one attempt share with nobody else.

torchrun keeps one store for as long as it lives and hands it to every attempt (PyTorch 2.13), so a restarted rank may
find the address of a rank that is dead. The number of restarts tells the attempts apart on one machine only: an agent
that joins the restart of another does not count it. So the first rank makes up a name, and tells it to processes that
have proven to be alive.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_LOOKS_EVERY = 0.05  # seconds


def fresh_store(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """``store`` under a prefix that is new, and the same on every rank (collective over all ranks).

    Every rank asks under a word of its own that no earlier process can have used. A question that a dead rank left
    behind is answered too, but nobody hears that; the first rank goes on until all living ranks have.

    Raises:
        torch.distributed.DistError: some rank has not come within ``timeout``.
    """
    if rank != 0:
        word = f"argonne/{uuid.uuid4().hex}"
        store.set(f"argonne/asks/{rank}", word)
        store.wait([word], timeout)
        name = store.get(word).decode()
        store.set(f"{name}/heard/{rank}", "")
        return dist.PrefixStore(name, store)

    name = f"argonne/{uuid.uuid4().hex}"
    deadline = time.monotonic() + timeout.total_seconds()
    missing = list(range(1, world_size))
    while missing:
        for other in missing:
            if store.check([f"argonne/asks/{other}"]):
                store.set(store.get(f"argonne/asks/{other}").decode(), name)
        time.sleep(_LOOKS_EVERY)
        missing = [other for other in missing if not store.check([f"{name}/heard/{other}"])]
        if missing and time.monotonic() > deadline:
            raise dist.DistStoreError(f"timed out: rank {missing[0]} has not joined within {timeout.seconds} s")
    return dist.PrefixStore(name, store)
