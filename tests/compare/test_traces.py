"""``diff`` of two runs with traces names the first module, forward or backward, gradient or weight that differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from argonne.compare.traces import Parting, compare_traces, first_difference
from argonne.training.trace_file import TraceLine, write_trace
from tests.compare.planted import Tool

LINES = [
    TraceLine("forward", "a", (1, 2)),
    TraceLine("forward", "b", (3, 4)),
    TraceLine("backward", "b", (5, 6)),
    TraceLine("backward", "a", (7, 8)),
    TraceLine("gradient", "b.weight", (9,)),
    TraceLine("weight", "b.weight", (10,)),
]
ORDER = [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (2, 1), (3, 1), (4, None), (5, None)]
"""Line and leaf, as they are computed."""


def write(run: Path, steps: dict[int, list[TraceLine]], leaves: int = 2) -> Path:
    run.mkdir(exist_ok=True)
    for step, lines in steps.items():
        write_trace(run, step, leaves, lines)
    return run


def changed(lines: list[TraceLine], line: int, leaf: int | None) -> list[TraceLine]:
    hashes = list(lines[line].hashes)
    hashes[leaf or 0] += 100
    return [*lines[:line], replace(lines[line], hashes=tuple(hashes)), *lines[line + 1 :]]


def test_it_is_the_first_in_the_order_of_execution(tmp_path: Path) -> None:
    one = write(tmp_path / "one", dict.fromkeys((2, 4, 5), LINES))
    later = LINES
    for line, leaf in reversed(ORDER):
        later = changed(later, line, leaf)
        other = write(tmp_path / "other", {2: LINES, 3: changed(LINES, 0, 0), 4: later, 5: changed(LINES, 0, 0)})
        expected = Parting(4, leaf, LINES[line].kind, LINES[line].name)
        assert first_difference(one, other) == first_difference(other, one) == expected


def test_what_only_one_run_has_is_passed_over_and_told(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", {1: LINES}), write(tmp_path / "other", {1: LINES[1:], 2: LINES[:1]})
    assert first_difference(one, other) is None
    assert [(found.text, found.differs) for found in compare_traces(one, other)] == [
        ("equal: modules, gradients and weights of 1 traced steps (1 to 1)", False),
        ("1 lines of a trace are in one of the runs only (forward, a)", False),
    ]
    assert list(compare_traces(one, write(tmp_path / "none", {}))) == []


def test_of_steps_with_other_micro_batches_only_gradients_and_weights_are_compared(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {1: LINES})
    finer = [replace(line, hashes=line.hashes * 2) if len(line.hashes) == 2 else line for line in LINES]
    other = write(tmp_path / "other", {1: changed(finer, 0, 0)}, leaves=4)
    assert first_difference(one, other) is None
    *_, told = compare_traces(one, other)
    assert (
        told.text == f"step 1 has 2 micro-batches in {one} and 4 in {other}: only gradients and weights were compared"
    )
    write(other, {1: changed(finer, 5, None)}, leaves=4)
    assert first_difference(one, other) == Parting(1, None, "weight", "b.weight")


def test_diff_tells_of_it_between_metrics_and_checkpoints(tool: Tool, run_alone: Path, other_run: Path) -> None:
    write(other_run, {3: changed(LINES, 2, 1)})
    assert tool("diff", run_alone, other_run)[0] == 0
    another = write(other_run.parent / "another", {3: LINES})
    for path in run_alone.iterdir():
        (another / path.name).symlink_to(path)
    status, lines = tool("diff", another, other_run)
    assert status == 1
    assert lines[0].startswith("equal: batch_hash")
    assert lines[1] == "step 3, micro-batch 1: the gradient of the output of b, in backward, differs first"
    assert lines[2].startswith("equal: the checkpoints")
