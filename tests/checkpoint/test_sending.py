"""What a save sends is announced: the recorder sees each part on its way to the rank that writes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from argonne.checkpoint import Piece, save_checkpoint
from argonne.parallel import ColumnParallelLinear, Layout, ProcessGroups, initialise, record, sharded_parameters
from argonne.parallel.communication.recording import Collective
from argonne.parallel.sharding.spec import regions_of
from tests.pool import RankPool


def save_recorded(groups: ProcessGroups, root: Path, check: bool) -> list[Collective]:
    layer = ColumnParallelLinear(3, 6, groups, bias=True)
    parameters = sharded_parameters(layer, groups)
    initialise(parameters, seed=1)
    pieces = [Piece(region.name, region, part) for region, part in regions_of(parameters)]
    with record(check=groups if check else None) as log:
        save_checkpoint(root, 1, pieces, [], lambda directory: None, groups)
    return log.collectives


@pytest.mark.parametrize("check", [False, True])
def test_every_part_of_a_save_is_a_recorded_transfer_to_its_writer(
    ranks: RankPool, tmp_path: Path, check: bool
) -> None:
    for rank, found in enumerate(ranks.run(Layout(tensor=3), save_recorded, tmp_path, check)):
        sent = [(c.ranks, c.shape, c.dtype, c.bytes) for c in found if c.op == "transfer"]
        of_rank = {
            source: [((source, 0), (2,), torch.float32, 8), ((source, 0), (2, 3), torch.float32, 24)]
            for source in (1, 2)
        }
        bias, weight = ([of_rank[source][kind] for source in (1, 2)] for kind in (0, 1))
        assert sent == (bias + weight if rank == 0 else of_rank[rank])
        assert {c.op for c in found} == {"transfer", "gather_objects"}
        assert {c.phase for c in found} == {"outside"}
    (written,) = tmp_path.rglob("*.safetensors")
    layer = ColumnParallelLinear(3, 6, ProcessGroups.single(), bias=True)
    initialise(sharded_parameters(layer, ProcessGroups.single()), seed=1)
    for name, whole in load_file(written).items():
        assert torch.equal(whole, layer.get_parameter(name).data)
