"""Training over any product of the axes is training in one process: losses to 1e-9, weights to 1e-8."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from argonne.checkpoint.format import read_manifest, step_directory
from argonne.parallel import Layout, ProcessGroups
from tests.models.layout_matrix import STEPS, Case, every_case, train
from tests.pool import RankPool
from tests.whole import assemble, assert_close

pytestmark = pytest.mark.slow

FAST = [
    Case(Layout(pipeline=2), "1f1b", tied=True, accumulation=4),
    Case(Layout(pipeline=2), "zb", tied=True, accumulation=1),
    Case(Layout(pipeline=2), "interleaved", tied=False, accumulation=4, documents=True, family="qwen3"),
    Case(Layout(context=2), kind="zero1", tied=False, accumulation=4),
    Case(Layout(data=2), "zb", "fsdp", tied=True, accumulation=4),  # a schedule, but no pipeline
    Case(Layout(pipeline=2, data=2), "gpipe", "fsdp", tied=True, accumulation=1),
    Case(Layout(pipeline=2, tensor=2, sequence_parallel=True), "zb", "replicate", False, 4, 5, None, True, "qwen3"),
    Case(Layout(data=2, context=2), kind="replicate", tied=True, accumulation=1, documents=True),
    Case(Layout(context=2, tensor=2, sequence_parallel=True), kind="fsdp", tied=True, accumulation=4, family="qwen3"),
    Case(Layout(data=4), kind="fsdp", tied=True, accumulation=2, shard=2),
    Case(Layout(tensor=4, uneven_shards=True), tied=False, accumulation=4, family="qwen3"),
    Case(Layout(data=2, tensor=2, sequence_parallel=True, uneven_shards=True), kind="zero1", tied=True, accumulation=1),
]
SLOW = [
    Case(Layout(pipeline=2, data=2, tensor=2, sequence_parallel=True), "interleaved", "zero1", True, 4),
    Case(Layout(pipeline=2, data=2, context=2), "1f1b", "fsdp", False, 4, documents=True),
    Case(Layout(pipeline=4, context=2), "zb", "zero1", True, 4),
    Case(Layout(tensor=8, sequence_parallel=True), tied=False, accumulation=4),
    Case(Layout(data=4, tensor=2, sequence_parallel=True), kind="fsdp", tied=True, accumulation=2, shard=2),
    Case(Layout(pipeline=2, data=2, context=2), "interleaved", "fsdp", False, 4, shard=2),
]


@cache
def alone(
    layers: int,
    tied: bool,
    documents: bool = False,
    uneven: bool = False,
    family: str = "llama",
    optimizer: str = "adamw",
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The run in one process; accumulation changes nothing but the last bits."""
    layout = Layout(uneven_shards=uneven)
    groups = ProcessGroups.single()
    case = Case(layout, tied=tied, blocks=layers, documents=documents, family=family, optimizer=optimizer)
    losses, parts = train(groups, case)
    return losses, assemble([parts])


def compare(ranks: RankPool, case: Case) -> None:
    uneven = case.layout.uneven_shards
    losses, weights = alone(case.layers, case.tied, case.documents, uneven, case.family, case.optimizer)
    assert len(set(losses)) == STEPS, "nothing happened"
    results = ranks.run(case.layout, train, case)
    for rank, (found, _) in enumerate(results):
        assert found == pytest.approx(losses, rel=1e-9), f"{case}: losses of rank {rank}"
    assembled = assemble(parts for _, parts in results)
    assert assembled.keys() == weights.keys()
    for name, value in weights.items():
        assert_close(assembled[name], value, 1e-9 if case.optimizer == "muon" else 1e-8, f"{case}: {name}")


@pytest.mark.parametrize("case", FAST, ids=str)
def test_training_equals_one_process(ranks: RankPool, case: Case) -> None:
    compare(ranks, case)


MUON = [
    Case(Layout(context=2, tensor=2, sequence_parallel=True), kind="fsdp", tied=True, accumulation=4, optimizer="muon"),
    Case(Layout(tensor=4, uneven_shards=True), tied=False, accumulation=4, optimizer="muon"),
    replace(FAST[-1], optimizer="muon"),
]


@pytest.mark.parametrize("case", MUON, ids=str)
def test_muon_trains_as_in_one_process(ranks: RankPool, case: Case) -> None:
    """Whose steps are those of a formula: tests/training/test_muon.py."""
    compare(ranks, case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [replace(case, optimizer="muon") for case in [*FAST, *SLOW]], ids=str)
def test_muon_trains_as_in_one_process_in_every_layout(ranks: RankPool, case: Case) -> None:
    compare(ranks, case)


@pytest.mark.parametrize("examples", [2, pytest.param(40, marks=pytest.mark.exhaustive)])
def test_a_checkpoint_of_any_layout_goes_on_in_any_other(ranks: RankPool, examples: int) -> None:
    """In a third layout too: what is saved after going on is as good as what was saved first."""
    cases = st.sampled_from([case for case in every_case() if case.layout.world_size <= 4 and case.layers <= 5])

    @settings(max_examples=examples)
    @given(cases, cases, cases, st.integers(1, STEPS - 3), st.data())
    def claim(first: Case, second: Case, third: Case, stop: int, data: st.DataObject) -> None:
        optimizer = data.draw(st.sampled_from(["adamw", "muon"]))
        documents = first.documents
        stops = [0, stop, data.draw(st.integers(stop + 1, STEPS - 1)), STEPS]
        kept = {"tied": first.tied, "blocks": 5, "documents": documents, "family": first.family, "optimizer": optimizer}
        uneven = first.layout.uneven_shards
        losses, weights = alone(5, first.tied, documents, uneven, first.family, optimizer)
        found: list[float] = []
        with TemporaryDirectory() as name:
            for case, (begin, end) in zip((first, second, third), pairwise(stops), strict=True):
                layout = replace(case.layout, uneven_shards=uneven)
                case = replace(case, layout=layout, **kept)
                results = ranks.run(case.layout, train, case, begin, end, Path(name))
                found += results[0][0]
        assert found == pytest.approx(losses, rel=1e-9)
        assembled = assemble(parts for _, parts in results)
        for tensor, value in weights.items():
            assert_close(assembled[tensor], value, 1e-8, f"{first} -> {second} -> {third}: {tensor}")

    claim()


def test_moving_to_another_layout_changes_no_bit_of_weights_and_moments(ranks: RankPool, tmp_path: Path) -> None:
    """A checkpoint that is loaded and saved again at once has the same hash of every whole tensor."""
    case = Case(Layout(pipeline=2, data=2), "interleaved", "fsdp", tied=True, accumulation=4, optimizer="muon")
    ranks.run(case.layout, train, case, 0, 3, tmp_path)
    written = read_manifest(step_directory(tmp_path, 3))
    for other in FAST:
        even = replace(other.layout, uneven_shards=False)
        other = replace(other, layout=even, tied=True, blocks=5, family="llama", optimizer="muon")
        ranks.run(other.layout, train, other, 3, 3, tmp_path)
        assert read_manifest(step_directory(tmp_path, 3)).tensors == written.tensors, f"{case} -> {other}"


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_training_on_eight_ranks_equals_one_process(ranks: RankPool, case: Case) -> None:
    compare(ranks, case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", list(every_case()), ids=str)
def test_every_product_of_the_axes_equals_one_process(ranks: RankPool, case: Case) -> None:
    compare(ranks, case)
