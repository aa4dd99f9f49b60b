"""Wrong declarations are refused by every rank in one line that names tensor, ranks and indices; right ones are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from argonne.checkpoint import save_checkpoint, weight_pieces
from argonne.parallel import (
    ColumnParallelLinear,
    Layout,
    LayoutError,
    Normal,
    Partition,
    ProcessGroups,
    Region,
    RowParallelLinear,
    ShardSpec,
    VocabParallelEmbedding,
    check_declarations,
    data_parallel,
    initialise,
    narrow_rows,
    replicated,
    sharded,
    sharded_parameters,
)
from tests.pool import RankPool

TWO = [Layout(tensor=2), Layout(tensor=2, data=2), Layout(tensor=2, sequence_parallel=True)]
ROWS, COLUMNS = 16, 6


class Declared(nn.Module):
    """One parameter of this rank's rows of ``w``, with the declaration that ``spec`` makes."""

    def __init__(self, shape: tuple[int, ...], spec: ShardSpec) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full(shape, 0.25))
        self.spec = spec

    def shard_specs(self) -> dict[str, ShardSpec]:
        return {"w": self.spec}


def region(groups: ProcessGroups, **changes: object) -> Region:
    """The right one: half of the rows."""
    rank, rows = groups.tensor.rank, ROWS // groups.tensor.size
    right = Region("w", (ROWS, COLUMNS), (rank * rows, 0), (rows, COLUMNS), (0, 0), (rank,))
    return replace(right, **changes)  # type: ignore[arg-type]


def wrong(groups: ProcessGroups, mistake: str) -> nn.Module:
    """A model with that mistake, on the rank or ranks where it is made."""
    rank, last = groups.tensor.rank, groups.tensor.size - 1
    half = (ROWS // 2, COLUMNS)
    changes: dict[str, dict[str, object]] = {
        "start forgotten": {"start": (0, 0)},
        "holders the first on every rank": {"holders": (0,)},
        "holders all on every rank": {"holders": (0, 1)},
        "a holder that is not there": {"holders": (rank, 2)},
        "shape too small": {"shape": (5, COLUMNS)},
        "columns left out": {"shape": (ROWS // 2, COLUMNS - 2)},
        "whole_shape too small on one rank": {"whole_shape": (ROWS // 2 if rank == last else ROWS, COLUMNS)},
        "whole_shape too small on all": {"whole_shape": (ROWS - 1, COLUMNS)},
        "whole_shape too large": {"whole_shape": (ROWS + 3, COLUMNS)},
        "rows that overlap": {"start": (rank * 6, 0)},
        "beyond the parameter": {"shape": (ROWS // 2 + 1, COLUMNS)},
        "local_start beyond the parameter": {"local_start": (1, 0)},
        "partial on one rank": {"partial_gradient": rank == 0},
        "another name on one rank": {"name": f"w{rank}" if rank else "w"},
        "a dimension too few": {"start": (0,), "shape": (8,), "local_start": (0,)},
        "replicas of another job": {"replicas": (7,)},
    }
    if mistake in changes:
        return Declared(half, ShardSpec((region(groups, **changes[mistake]),), Normal(1.0)))
    if mistake == "layers of a lone process":
        lone = ProcessGroups.single()
        return nn.Sequential(ColumnParallelLinear(4, 8, lone), RowParallelLinear(8, 4, lone, bias=True))
    if mistake == "experts of other numbers":
        return nn.ModuleDict({f"expert{2 * rank + n}": nn.Linear(3, 5, bias=False) for n in range(2)})
    if mistake == "experts of other shapes":
        return nn.ModuleDict({"expert": nn.Linear(3, 5 + rank, bias=False)})
    if mistake == "experts of other values":
        torch.manual_seed(7 + rank)
        return nn.ModuleDict({"expert": nn.Linear(3, 5, bias=False)})
    if mistake == "another dtype":
        return Declared(half, ShardSpec((region(groups),))).to(torch.float64 if rank else torch.float32)
    if mistake == "two regions in one place":
        both = tuple(region(groups, name=name) for name in ("w", "v"))
        return Declared(half, ShardSpec(both))
    if mistake == "a part of a partial tensor missing":
        whole = replicated("w", half, groups, partial_gradient=True)
        return Declared(half, whole if rank == 0 else ShardSpec(()))
    raise AssertionError(mistake)


UNDECLARED_EXPERTS = ("experts of other numbers", "experts of other shapes", "experts of other values")
SAID = {
    "start forgotten": "'w' [16, 6]: ranks 0, 1 each claim [0:8, 0:6] for their own, and nobody holds [8:16, 0:6]",
    "holders the first on every rank": "rank 1 has [8:16, 0:6], but as rank 1 of tensor is not among its holders (0,)",
    "holders all on every rank": "[0:8, 0:6] is on {all0}, but by its declaration on {all}",
    "a holder that is not there": "[0:8, 0:6] has the holders (0, 2) over tensor, which has 2 ranks",
    "shape too small": "'w' [16, 6]: nobody holds [5:8, 0:6] and [13:16, 0:6]",
    "columns left out": "'w' [16, 6]: nobody holds [0:16, 4:6]",
    "whole_shape too small on one rank": "whole_shape of 'w' is (16, 6) on {all0}, (8, 6) on {all1}",
    "whole_shape too small on all": "'w' [15, 6]: rank 1 claims [8:16, 0:6]; legal: indices within the whole tensor",
    "whole_shape too large": "'w' [19, 6]: nobody holds [16:19, 0:6]",
    "rows that overlap": "{all} hold [6:8, 0:6] in regions that overlap, and nobody holds [14:16, 0:6]",
    "beyond the parameter": "'w' is to lie at [0:9, 0:6] of w [8, 6]; legal: within the parameter",
    "local_start beyond the parameter": "'w' is to lie at [1:9, 0:6] of w [8, 6]; legal: within the parameter",
    "partial on one rank": "partial_gradient of 'w' is True on {all0}, False on {all1}",
    "another name on one rank": "'w' [16, 6]: nobody holds [8:16, 0:6]",
    "a dimension too few": "'w' is to lie at [0:8] of w [8, 6]; legal: within the parameter",
    "replicas of another job": "rank 0 has [0:8, 0:6], but as rank 0 of replicas is not among its holders (7,)",
    "layers of a lone process": "'0.weight' [8, 4]: rank 1 has [0:8, 0:4], but as rank 1 of tensor is not",
    "experts of other numbers": "'expert0.weight' [5, 3]: [0:5, 0:3] is on {all0}, but by its declaration on {all}; "
    "legal: a declaration in shard_specs(), without which it counts as replicated",
    "experts of other shapes": "whole_shape of 'expert.weight' is (5, 3) on {all0}, (6, 3) on {all1}",
    "experts of other values": "'expert.weight' differs between ranks 0, 1 by up to",
    "another dtype": "dtype of 'w' is torch.float32 on {all0}, torch.float64 on {all1}",
    "two regions in one place": "'w' and 'v' lie both at [0:8, 0:6] of w; legal: regions that do not overlap",
    "a part of a partial tensor missing": "'w' [8, 6]: [0:8, 0:6] is on {all0}, but by its declaration on {all}",
}


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except LayoutError as error:
        return str(error)
    return "nothing was refused"


def refused(groups: ProcessGroups, mistake: str) -> str:
    # Undeclared modules that are no norms are refused before under sequence parallelism: test_where_used.py.
    plain = groups.without_sequence_parallel() if mistake in UNDECLARED_EXPERTS else groups
    return refusal(lambda: check_declarations(sharded_parameters(wrong(plain, mistake), plain), plain))


@pytest.mark.parametrize("layout", TWO, ids=str, scope="module")
def test_every_mistake_is_one_line_with_tensor_ranks_and_indices(ranks: RankPool, layout: Layout) -> None:
    named = {
        f"all{place}": [r for r in range(layout.world_size) if place in ("", layout.coordinates(r)[-1])]
        for place in ("", 0, 1)
    }
    words = {name: f"rank{'s' if len(those) > 1 else ''} {', '.join(map(str, those))}" for name, those in named.items()}
    for mistake, said in SAID.items():
        found = ranks.run(layout, refused, mistake)
        assert len(set(found)) == 1, f"{mistake}: the ranks say {found}"
        assert said.format(**words) in found[0], f"{mistake}: {found[0]}"
        assert "\n" not in found[0]


def right_model(groups: ProcessGroups) -> nn.Module:
    """Cut rows and columns, unequal and shared blocks, ranks without a token, a norm, a bias, stacked experts."""
    size, rank = groups.tensor.size, groups.tensor.rank
    shared = Partition("kv", 2, tuple(range(n * 2 // size, n * 2 // size + 1) for n in range(size)))
    parts = [Partition.split("q", 7, size, uneven=True), shared]
    each = 4 // size
    experts = nn.ModuleDict({f"expert{n}": nn.Module() for n in range(rank * each, (rank + 1) * each)})
    for name, expert in experts.items():
        one = Region("w", (3, 5), (0, 0), (3, 5), (0, 0), (rank,))
        experts[name] = Declared((3, 5), ShardSpec((one,), Normal(0.5)))
        del expert
    stacked = Declared((4 // size, 3, 5), sharded("w", (4, 3, 5), 0, groups, Normal(0.5)))
    return nn.ModuleDict(
        {
            "embed": VocabParallelEmbedding(9, 6, groups),
            "fused": ColumnParallelLinear(6, parts, groups, bias=True),
            "down": RowParallelLinear(8, 6, groups, bias=True),
            "norm": nn.LayerNorm(6),
            "experts": experts,
            "stacked": stacked,
        }
    )


def no_alarm(groups: ProcessGroups) -> list[str]:
    model = right_model(groups)
    parameters = sharded_parameters(model, groups)
    before = refusal(lambda: check_declarations(parameters, groups))  # the weights are still empty
    initialise(parameters, seed=5)
    found = [before, refusal(lambda: check_declarations(parameters, groups, values=True))]
    size, number = groups.replicas.size, groups.replicas.rank
    rows = []
    for held in parameters:  # as ZeRO does it: more replicas than rows leave some without any
        each = -(-len(held.parameter) // size)
        own = range(min(number * each, len(held.parameter)), min((number + 1) * each, len(held.parameter)))
        part = nn.Parameter(held.parameter.data[own.start : own.stop])
        rows.append(narrow_rows(held, own, part, (number,)))
    return [*found, refusal(lambda: check_declarations(rows, groups, values=True))]


@pytest.mark.parametrize(
    "layout",
    [*TWO, Layout(), Layout(data=2), Layout(tensor=4), Layout(pipeline=1, data=2, context=2)],
    ids=str,
    scope="module",
)
def test_right_declarations_are_never_refused(ranks: RankPool, layout: Layout) -> None:
    assert ranks.run(layout, no_alarm) == [["nothing was refused"] * 3] * layout.world_size


def save_wrong(groups: ProcessGroups, mistake: str, directory: str) -> tuple[str, bool]:
    plain = groups.without_sequence_parallel() if mistake in UNDECLARED_EXPERTS else groups
    pieces = weight_pieces(sharded_parameters(wrong(plain, mistake), plain))
    said = refusal(lambda: save_checkpoint(Path(directory), 3, pieces, [], lambda path: None, groups))
    return said, any(Path(directory).iterdir())


@pytest.mark.parametrize("layout", TWO, ids=str, scope="module")
def test_a_save_refuses_them_and_leaves_no_file(ranks: RankPool, layout: Layout, tmp_path: Path) -> None:
    for mistake in (
        "start forgotten",
        "holders the first on every rank",
        "shape too small",
        "whole_shape too small on one rank",
        "beyond the parameter",
        "layers of a lone process",
        *UNDECLARED_EXPERTS,
    ):
        found = ranks.run(layout, save_wrong, mistake, str(tmp_path))
        assert len(set(found)) == 1, f"{mistake}: the ranks say {found}"
        said, has_files = found[0]
        assert "legal:" in said, f"{mistake}: {said}"
        assert not has_files


def replicate_wrong(groups: ProcessGroups, mistake: str) -> str:
    return refusal(lambda: data_parallel(wrong(groups, mistake), groups))


@pytest.mark.parametrize("layout", TWO, ids=str, scope="module")
def test_data_parallel_refuses_them(ranks: RankPool, layout: Layout) -> None:
    for mistake in ("start forgotten", "shape too small", "layers of a lone process"):
        found = ranks.run(layout, replicate_wrong, mistake)
        assert len(set(found)) == 1
        assert "legal:" in found[0], f"{mistake}: {found[0]}"


def moments_missing(groups: ProcessGroups, directory: str) -> str:
    model = Declared((8, COLUMNS), ShardSpec((region(groups),), Normal(1.0)))
    parameters = sharded_parameters(model, groups)
    pieces = weight_pieces(parameters)
    moments = [replace(piece, name="w.exp_avg") for piece in pieces if groups.tensor.rank == 0]
    return refusal(lambda: save_checkpoint(Path(directory), 3, pieces, moments, lambda path: None, groups))


def test_moments_that_one_rank_does_not_save_are_named(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(Layout(tensor=2), moments_missing, str(tmp_path))
    assert found == [found[0]] * 2
    assert "'w.exp_avg' [16, 6]: nobody holds [8:16, 0:6]" in found[0]


def two_stages(groups: ProcessGroups, tied: bool) -> str:
    model = Declared((3, 4), replicated("w", (3, 4), groups))
    parameters = sharded_parameters(model, groups)
    if tied:
        held = tuple(replace(r, stages=(0, 1)) for r in parameters[0].spec.regions)
        parameters = [replace(parameters[0], spec=ShardSpec(held))]
    return refusal(lambda: check_declarations(parameters, groups, values=True))


def test_a_tensor_on_two_stages_must_say_so(ranks: RankPool) -> None:
    assert ranks.run(Layout(pipeline=2), two_stages, True) == ["nothing was refused"] * 2
    for said in ranks.run(Layout(pipeline=2), two_stages, False):
        assert "'w' [3, 4]: ranks 0, 1 each claim [0:3, 0:4] for their own" in said
