"""Within ``isolated`` every collective ends at once, in equal memory, and the others hear nothing."""

from __future__ import annotations

from typing import Any

import torch

from argonne.parallel import Layout, ProcessGroups
from argonne.parallel.communication import collectives
from argonne.parallel.communication.isolation import is_isolated, isolated
from tests.pool import RankPool


def alone(groups: ProcessGroups) -> dict[str, Any]:
    """What every collective gives the first rank while the other issues none; then, together, a sum that is right."""
    axis, found = groups.tensor, {}
    if groups.is_first:
        with isolated():
            own = torch.arange(1.0, 5.0)
            found["sum"] = collectives.all_reduce(own.clone(), axis)
            found["gathered"] = collectives.all_gather(own, axis)
            into = torch.empty(8)
            found["gathered into"] = collectives.start_all_gather(own, axis, into=into).wait()
            found["scattered"] = collectives.reduce_scatter(own, axis)
            found["all to all"] = collectives.start_all_to_all(own.view(2, 2), axis).wait()
            for receives in ((3, 2), (0, 3)):  # more than is sent, and less
                pending = collectives.start_uneven_all_to_all(own, (1, 3), receives, axis)
                found[f"of unequal parts {receives}"] = pending.wait()
            found["broadcast"] = collectives.broadcast(own.clone(), axis, source=1)
            found["exchanged"] = collectives.exchange(own, axis, 0, 1)
            found["received"] = collectives.transfer(own.clone(), axis, 1, 0)
            found["sent"] = collectives.transfer(own.clone(), axis, 0, 1)
            found["objects"] = collectives.gather_objects("own", axis)
            collectives.barrier(axis)
            found["within"] = is_isolated()
    found["after"] = collectives.all_reduce(torch.tensor([1.0 + axis.rank]), axis)
    return found


def test_a_rank_finds_its_own_in_place_of_what_others_would_send(ranks: RankPool) -> None:
    first, second = ranks.run(Layout(tensor=2), alone)
    own, ones = [1.0, 2.0, 3.0, 4.0], [1.0] * 4
    expected = {
        "sum": own,
        "gathered": [own, own],
        "gathered into": [*ones, *ones],
        "scattered": own[:2],
        "all to all": [own[:2], own[2:]],
        "of unequal parts (3, 2)": [*own, 1.0],
        "of unequal parts (0, 3)": own[:3],
        "broadcast": own,
        "exchanged": ones,
        "received": ones,
        "sent": own,
        "objects": ["own", "own"],
        "within": True,
        "after": [3.0],
    }
    expected["gathered into"] = [*own, *ones]  # in messages: its own place, and what is received
    found = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in first.items()}
    assert found == expected
    assert second["after"].tolist() == [3.0]
    assert not is_isolated()
