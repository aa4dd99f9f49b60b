"""benchmarks/one_device.py: ranks one after the other compute what ranks beside each other do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from argonne.models import preset
from argonne.parallel import ArgonneError, Layout, ProcessGroups
from benchmarks.lockstep import in_lockstep
from benchmarks.one_device import Computed, Flags, check, differences, program_of, run
from tests.pool import RankPool

SHAPE, TOKENS = replace(preset("demo"), num_key_value_heads=2), 384  # so many that sums go in segments, and not whole
FLAGS = Flags(preset="demo")


def on_a_rank(groups: ProcessGroups, blocks: int | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    found = program_of(SHAPE, FLAGS, TOKENS, blocks)(groups)()
    return found.output, found.input_gradient, [part for _, part in found.parts]


def in_turn(ranks: int, blocks: int | None) -> list[Computed]:
    return in_lockstep(Layout(tensor=ranks), torch.device("cpu"), program_of(SHAPE, FLAGS, TOKENS, blocks))[0]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_in_turn_have_the_bits_of_real_ranks(ranks: RankPool, size: int) -> None:
    beside_each_other = ranks.run(Layout(tensor=size), on_a_rank, 8)
    for found, (output, input_gradient, parts) in zip(in_turn(size, 8), beside_each_other, strict=True):
        assert torch.equal(found.output, output)
        assert torch.equal(found.input_gradient, input_gradient)
        assert all(torch.equal(part, other) for (_, part), other in zip(found.parts, parts, strict=True))


def test_other_bits_are_named() -> None:
    (alone,) = in_turn(1, 8)
    assert differences([alone], alone) == []
    (fast,) = in_turn(1, None)
    assert {"output", "input gradient"} < set(differences([fast], alone))


def test_a_run_says_whether_all_are_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = replace(FLAGS, tensor=(1, 8), tokens=16, rounds=1, output=tmp_path / "one.json")
    assert run(flags) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == [
        "TP 1, 0 collectives: the bits of one rank, twice",
        "TP 8, 8 collectives: the bits of one rank, twice",
    ]
    report = json.loads((tmp_path / "one.json").read_text())
    assert [record["differs"] for record in report["records"]] == [[], []]
    assert list(report["cases"]) == ["TP 1", "TP 8", "cost"]


def test_what_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(ArgonneError, match=r"tensor_parallel=3 does not share out 8 canonical blocks"):
        check(replace(FLAGS, tensor=(3,)))
    with pytest.raises(ArgonneError, match=r"tokens=12 are not legal; legal: 1 or more, and multiples of blocks=8"):
        check(replace(FLAGS, tokens=12))
