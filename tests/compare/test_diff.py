"""``diff`` names the first step and field in which two runs differ, then the first checkpoint and its tensors."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from argonne.checkpoint import step_directory
from argonne.parallel import ArgonneError
from argonne.training.run.file import write_run
from tests.compare.planted import (
    Tool,
    edit_step,
    next_float32,
    one_ulp_up,
    plant,
    plant_honestly,
    step_of_metrics,
)

NORM = "model.layers.1.input_layernorm.weight"
EQUAL_STEPS = "equal: batch_hash, tokens, learning_rate, loss, grad_norm of 8 steps (1 to 8)"
EQUAL_CHECKPOINTS = "equal: the checkpoints of steps 4, 8"


def test_a_run_equals_its_copy_whatever_was_measured(tool: Tool, run_alone: Path, other_run: Path) -> None:
    for step in range(1, 9):
        edit_step(other_run, step, step_time=9.0, memory_gib=7.0, layout={"tensor": 9}, tokens_per_second=1.0, mfu=0.1)
    assert tool("diff", run_alone, other_run) == (0, [EQUAL_STEPS, EQUAL_CHECKPOINTS])


def test_one_ulp_in_the_loss_of_one_step_is_named(tool: Tool, run_alone: Path, other_run: Path) -> None:
    loss = step_of_metrics(run_alone, 7)["loss"]
    edit_step(other_run, 7, loss=next_float32(loss))
    assert tool("diff", run_alone, other_run) == (
        1,
        [
            f"step 7: loss differs ({loss} against {next_float32(loss)}) by 1 ulp of float32; "
            "1 of 8 steps (1 to 8) differ",
            EQUAL_CHECKPOINTS,
        ],
    )


def test_a_norm_is_measured_in_float64_and_so_is_a_loss_that_float32_does_not_have(
    tool: Tool, run_alone: Path, other_run: Path
) -> None:
    norm, loss = (step_of_metrics(run_alone, 5)[name] for name in ("grad_norm", "loss"))
    edit_step(other_run, 5, grad_norm=math.nextafter(norm, math.inf))
    line = tool("diff", run_alone, other_run)[1][0]
    assert line.startswith(f"step 5: grad_norm differs ({norm} against ")
    assert ") by 1 ulp of float64; " in line
    edit_step(other_run, 5, loss=math.nextafter(loss, -math.inf))
    line = tool("diff", run_alone, other_run)[1][0]
    assert line.startswith(f"step 5: loss differs ({loss} against ")
    assert ") by 1 ulp of float64; there also grad_norm; " in line


def test_a_norm_that_is_not_there_is_no_number(tool: Tool, run_alone: Path, other_run: Path) -> None:
    norm = step_of_metrics(run_alone, 2)["grad_norm"]
    edit_step(other_run, 2, grad_norm=None)
    assert tool("diff", run_alone, other_run)[1][0].startswith(f"step 2: grad_norm differs ({norm} against none); ")


def test_another_batch_is_said_to_be_other_data(tool: Tool, run_alone: Path, other_run: Path) -> None:
    before = step_of_metrics(run_alone, 3)["batch_hash"]
    edit_step(other_run, 3, batch_hash="00ff", loss=1.0)
    edit_step(other_run, 6, loss=1.0)
    assert tool("diff", run_alone, other_run)[1][0] == (
        f"step 3: batch_hash differs ({before} against 00ff): the data differ; there also loss; "
        "2 of 8 steps (1 to 8) differ"
    )


def test_a_run_that_ends_earlier_is_compared_as_far_as_it_goes(tool: Tool, run_alone: Path, other_run: Path) -> None:
    path = other_run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:5]) + lines[5][:20])  # the last one was cut short
    shutil.rmtree(step_directory(other_run, 8))
    begins = f"{run_alone} begins at step 1, {other_run} at step 2"
    ends = f"{run_alone} ends at step 8, {other_run} at step 5"
    equal = "equal: batch_hash, tokens, learning_rate, loss, grad_norm of 4 steps (2 to 5)"
    assert tool("diff", run_alone, other_run) == (0, [begins, ends, equal, "equal: the checkpoints of steps 4"])
    shutil.rmtree(step_directory(other_run, 4))
    assert tool("diff", run_alone, other_run)[1][3] == "the runs have no checkpoint of the same step"


def test_the_first_checkpoint_that_differs_is_named_with_its_tensors(
    tool: Tool, run_alone: Path, other_run: Path
) -> None:
    plant_honestly(step_directory(other_run, 8), NORM, one_ulp_up((3,)))
    status, lines = tool("diff", run_alone, other_run)
    assert status == 1
    assert lines[:2] == [EQUAL_STEPS, "checkpoint of step 8: it differs, the first of 2 that both runs have"]
    assert len(lines) == 3
    assert lines[2].startswith(f"tensor {NORM}: 1 of 24 elements differ, first at [3] (")
    assert lines[2].endswith("), by at most 1 ulp of float32")
    plant_honestly(step_directory(other_run, 4), NORM, one_ulp_up((3,)))
    assert tool("diff", run_alone, other_run)[1][1].startswith("checkpoint of step 4: it differs, the first of 2 ")


def test_changed_bytes_under_the_old_manifest_are_not_equal(tool: Tool, run_alone: Path, other_run: Path) -> None:
    plant(step_directory(other_run, 4), NORM, one_ulp_up((3,)))
    status, lines = tool("diff", run_alone, other_run)
    assert status == 1
    assert lines[1] == "checkpoint of step 4: it differs, the first of 2 that both runs have"
    assert "has changed since it was written" in lines[2]
    assert [line for line in lines if line.startswith(f"tensor {NORM}: 1 of 24 elements differ")]


def test_runs_of_another_identity_are_compared_all_the_same(tool: Tool, run_alone: Path, other_run: Path) -> None:
    run = json.loads((other_run / "run.json").read_text())
    del run["sha256"]
    run["identity"]["seed"] = 99
    run["identity"]["schedule"]["gradient_clip"] = 3.0
    write_run(other_run, run)
    seed = json.loads((run_alone / "run.json").read_text())["identity"]["seed"]
    line = f"the runs are not of one identity: schedule.gradient_clip: 1.0 -> 3.0; seed: {seed} -> 99"
    assert tool("diff", run_alone, other_run) == (0, [line, EQUAL_STEPS, EQUAL_CHECKPOINTS])


def test_runs_at_two_layouts_part_by_rounding_on_the_same_data(tool: Tool, run_alone: Path, run_of_two: Path) -> None:
    status, lines = tool("diff", run_alone, run_of_two)
    assert status == 1
    assert " ulp of float" in lines[0]
    assert "batch_hash" not in lines[0]
    assert lines[1] == "checkpoint of step 4: it differs, the first of 2 that both runs have"
    assert all(line.startswith(("tensor ", "... and ")) for line in lines[2:]), lines  # and not the trainer's state


def test_two_checkpoints_are_compared_as_verify_does(tool: Tool, run_alone: Path, other_run: Path) -> None:
    pair = step_directory(run_alone, 8), step_directory(other_run, 8)
    assert tool("diff", *pair) == tool("verify", *pair)
    assert tool("diff", *pair)[0] == 0
    status, lines = tool("diff", pair[0], step_directory(other_run, 4))
    assert status == 1
    assert "trainer state: step: 8 -> 4" in lines


def test_runs_without_a_step_in_common_are_refused(tool: Tool, run_alone: Path, other_run: Path) -> None:
    path = other_run / "metrics.jsonl"
    path.write_text('{"step": 30}\n{"step": 31}\n')
    with pytest.raises(ArgonneError) as refusal:
        tool("diff", run_alone, other_run)
    assert str(refusal.value) == (
        f"no step is in the metrics.jsonl of both runs: {run_alone} has 1 to 8 and {other_run} has 30 to 31; "
        "legal: runs with a step in common"
    )


@pytest.mark.parametrize("content", ["[]\n", "{}\n", '{"step": "x"}\n', '{"step": 1\n{"step": 2}\n', "\n", "\xff"])
def test_a_line_that_is_of_no_step_is_refused(tool: Tool, run_alone: Path, other_run: Path, content: str) -> None:
    (other_run / "metrics.jsonl").write_bytes(content.encode("latin-1") + b'{"step": 3}\n')
    with pytest.raises(ArgonneError) as refusal:
        tool("diff", run_alone, other_run)
    assert str(other_run / "metrics.jsonl") in str(refusal.value)
    assert "\n" not in str(refusal.value)
