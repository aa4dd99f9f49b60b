"""The processes of one attempt find each other, whatever earlier attempts left in the launcher's store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from argonne.parallel.communication.rendezvous import fresh_store

PATIENCE = timedelta(seconds=20)


def attempt(server: dist.TCPStore, ranks: range, world_size: int, patience: timedelta = PATIENCE) -> list[dist.Store]:
    """``ranks`` join at once, each through a connection of its own."""

    def join(rank: int) -> dist.Store:
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=patience)
        return fresh_store(client, rank, world_size, patience)

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(join, ranks))


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_every_attempt_has_a_store_of_its_own(server: dist.TCPStore) -> None:
    for number in range(3):
        stores = attempt(server, range(4), 4)
        assert not stores[1].check(["address"]), "what an earlier attempt left is seen"
        stores[0].set("address", str(number))
        assert [store.get("address") for store in stores] == [str(number).encode()] * 4


def test_an_attempt_that_ended_before_all_had_joined_does_not_disturb_the_next(server: dist.TCPStore) -> None:
    with pytest.raises(dist.DistError):
        attempt(server, range(3), 4, timedelta(seconds=1))
    server.set("argonne/asks/3", "argonne/the word of a rank that died asking")
    stores = attempt(server, range(4), 4)
    stores[3].set("key", "value")
    assert all(store.get("key") == b"value" for store in stores)


def test_a_rank_that_never_comes_is_named(server: dist.TCPStore) -> None:
    with pytest.raises(dist.DistError, match="rank 1 has not joined within 1 s"):
        attempt(server, range(1), 2, timedelta(seconds=1))
