"""Reproducible runs by the command line: at any layout, and moved by kill -9, the bits of one process left alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integration.runs import history, run, run_until_killed, succeed, weights
from tests.integration.test_refusals import assert_refused

pytestmark = pytest.mark.slow

MICRO_BATCHES = 4  # of a step, over all replicas
RUN = {
    "--reproducible": None,
    "--block-size": 40,
    "--num-hidden-layers": 4,
    "--num-attention-heads": 8,
    "--num-key-value-heads": 4,
    "--hidden-size": 44,
    "--head-dim": 6,
    "--intermediate-size": 88,
    "--sample-tokens": 0,
    "--save-interval": 2,
    "--total-steps": 16,
    "--label-smoothing": 0.1,
    "--z-loss": 1e-3,
    "--schedule": "wsd",
    "--decay-steps": 9,
    "--decay-shape": "sqrt",
}
"""Of sixteen steps, saved at every second. What the loss is made of is told too."""

TP2 = {"--tensor-parallel": 2}
PP2 = {"--pipeline-parallel": 2}
DP2 = {"--data-parallel": 2}
SHARED = {"--sequence-parallel": None}
PLACES: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": TP2,
    "tp4": {"--tensor-parallel": 4},
    "tp2 + sp": {**TP2, **SHARED},
    "tp4 + sp": {"--tensor-parallel": 4, **SHARED},
    "pp2": PP2,
    "pp2 interleaved": {**PP2, "--pipeline-schedule": "interleaved"},
    "pp2 zb": {**PP2, "--pipeline-schedule": "zb"},
    "pp2 gpipe": {**PP2, "--pipeline-schedule": "gpipe"},
    "dp2": DP2,
    "dp4 zero1": {"--data-parallel": 4, "--zero1": None},
    "dp2 fsdp": {**DP2, "--fsdp": None},
    "tp2 pp2 dp2": {**TP2, **PP2, **DP2},
    "tp2 + sp pp2 zb dp2 zero1": {**TP2, **SHARED, **PP2, "--pipeline-schedule": "zb", **DP2, "--zero1": None},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "bf16": {"--precision": "bf16", "--document-mask": None, "--add-document-boundary-tokens": None},
    "untied": {"--tie-word-embeddings": False, "--disable-gradient-checkpointing": None},
    "heads": {"--num-key-value-heads": 8, "--document-mask": None, "--no-streaming": None},
}


def processes(place: str) -> int:
    sizes = [PLACES[place].get(f"--{axis}-parallel", 1) for axis in ("tensor", "pipeline", "data")]
    return sizes[0] * sizes[1] * sizes[2]


def flags_at(flags: dict[str, Any], place: str, directory: Path) -> dict[str, Any]:
    """The same run in that layout."""
    accumulation = MICRO_BATCHES // PLACES[place].get("--data-parallel", 1)
    return {**flags, **PLACES[place], "--gradient-accumulation-steps": accumulation, "--output-dir": directory}


def bits(directory: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Each step's line without its layout, and the hash of every weight and moment at the end."""
    lines = [{name: value for name, value in line.items() if name != "layout"} for line in history(directory)]
    return lines, weights(directory)


def moved(flags: dict[str, Any], legs: Sequence[tuple[str, int]], last: str, directory: Path) -> None:
    """Train in the layout of each leg until it is killed, so many logged steps later; in ``last`` to the end."""
    for place, steps in legs:
        run_until_killed("pretrain", flags_at(flags, place, directory), steps, nproc=processes(place))
    succeed("pretrain", flags_at(flags, last, directory), nproc=processes(last))


@pytest.fixture(scope="module")
def small(flags: dict[str, Any]) -> dict[str, Any]:
    return {**flags, **RUN}


@pytest.fixture(scope="module")
def alone(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the run in one process that nothing disturbed."""
    directory = tmp_path_factory.mktemp("alone")
    succeed("pretrain", flags_at(small, "one", directory), nproc=1)
    return directory


def test_a_run_killed_and_moved_ends_with_the_bits_of_one_process_left_alone(
    small: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    moved(small, [("tp2 + sp", 5), ("dp2 fsdp", 4)], "pp2 zb", tmp_path)
    assert bits(tmp_path) == bits(alone)


def test_resuming_keeps_the_bits_or_is_refused(alone: Path) -> None:
    """The command does not say --reproducible: the run is."""
    before = bits(alone)
    batch = {**DP2, "--gradient-accumulation-steps": 3}
    done = run("resume", {"--checkpoint-path": alone, "--total-steps": 20, **batch})
    assert_refused(done, "data_parallel=2 with gradient_accumulation_steps=3 is not reproducible as replicate")
    assert bits(alone) == before


@pytest.mark.bits
def test_a_run_moved_at_random_steps_ends_with_the_bits_of_one_process_left_alone(
    small: dict[str, Any], alone: Path
) -> None:
    places = st.sampled_from(list(PLACES))

    @settings(max_examples=10)
    @given(st.lists(st.tuples(places, st.integers(1, 6)), min_size=1, max_size=4), places)
    def claim(legs: list[tuple[str, int]], last: str) -> None:
        with TemporaryDirectory() as name:
            moved(small, legs, last, Path(name))
            assert bits(Path(name)) == bits(alone)

    claim()


@pytest.mark.bits
@pytest.mark.parametrize("options", list(OPTIONS))
def test_fifty_steps_by_the_command_line_have_the_bits_of_one_process(
    small: dict[str, Any], options: str, tmp_path: Path
) -> None:
    long = {**small, **OPTIONS[options], "--total-steps": 50, "--save-interval": 50}
    expected = None
    for place in PLACES:
        directory = tmp_path / place
        succeed("pretrain", flags_at(long, place, directory), nproc=processes(place))
        found = bits(directory)
        expected = expected or found
        assert len(found[0]) == 50
        assert found == expected, f"{place}, {options}"
