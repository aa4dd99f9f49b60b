"""A model that is shared out over replicas never exists whole, on any of them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor

from argonne.models import ArgonneConfig, ArgonneModel, Execution, replicas_of
from argonne.parallel import Layout, ProcessGroups
from argonne.parallel.data_parallel import fully_shard as room
from tests.pool import RankPool

CONFIG = ArgonneConfig(16, 6, 4, 2, 24, 32)


def whole_bytes(model: torch.nn.Module) -> int:
    """Of the parameters that exist and are not shared out."""
    return sum(p.nbytes for p in model.parameters() if not p.is_meta and not isinstance(p, DTensor))


def build(groups: ProcessGroups) -> tuple[list[int], set[str]]:
    """What exists whole whenever a module is about to be shared out; and where everything lies at the end."""
    with torch.device("meta"):
        model = ArgonneModel(CONFIG, Execution(groups))
    sizes: list[int] = []
    shard = room.fully_shard

    def watched(module: torch.nn.Module, **options: Any) -> Any:
        sizes.append(whole_bytes(model))
        return shard(module, **options)

    with mock.patch.object(room, "fully_shard", watched):
        replicas_of(model, Execution(groups), "fsdp")
    return sizes, {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}


def test_under_fsdp_one_block_exists_at_a_time(ranks: RankPool) -> None:
    block = 4 * CONFIG.block_parameter_count
    outside = 4 * (CONFIG.parameter_count - CONFIG.num_hidden_layers * CONFIG.block_parameter_count)
    for sizes, devices in ranks.run(Layout(data=2), build):
        assert sizes == [block] * CONFIG.num_hidden_layers + [outside]
        assert devices == {"cpu"}
