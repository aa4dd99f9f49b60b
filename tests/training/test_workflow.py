"""A run from its first step to its last in this very process: begun, continued, resumed, and done."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from argonne.checkpoint import CheckpointError
from argonne.data import Assignment
from argonne.parallel import ArgonneError, ProcessGroups
from argonne.training.config import RunConfig, RunFlags, TrainingFlags
from argonne.training.run.directory import read_run
from argonne.training.run.identity import RunIdentity
from argonne.training.run.resume import parse_resume, resume
from argonne.training.run.workflow import is_done, lanes_note, pretrain
from tests.integration.runs import history, weights
from tests.training.small_run import small_run


def stopping(config: RunConfig, step: int | None, directory: Path | None = None) -> RunConfig:
    run = replace(config.run, stop_at_step=step, output_dir=directory or config.run.output_dir)
    return replace(config, run=run)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return small_run(tmp_path_factory.mktemp("workflow"))


@pytest.fixture(scope="module")
def whole(config: RunConfig) -> Path:
    """The four steps without a stop."""
    assert pretrain(config) == 0
    return config.run.output_dir


@pytest.fixture(scope="module")
def half(config: RunConfig) -> Path:
    """The first two of them."""
    directory = config.run.output_dir.parent / "half"
    assert pretrain(stopping(config, 2, directory)) == 0
    return directory


@pytest.fixture
def begun(half: Path, tmp_path: Path) -> Path:
    """A copy of the first two steps, for one test."""
    return shutil.copytree(half, tmp_path / "run")


def test_a_run_that_is_stopped_and_continued_is_the_undisturbed_one(
    config: RunConfig, whole: Path, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(stopping(config, None, begun)) == 0
    printed = capsys.readouterr().out
    assert f"continuing from {begun / 'step_00000002'}" in printed
    assert "changed from here on" not in printed
    assert history(begun) == history(whole)
    assert weights(begun) == weights(whole)


def test_the_directory_and_every_checkpoint_keep_the_same_identity(whole: Path) -> None:
    run = json.loads((whole / "run.json").read_text())
    trainers = [json.loads((step / "trainer.json").read_text()) for step in sorted(whole.glob("step_*"))]
    assert len(trainers) == 2
    for trainer in trainers:
        for name in ("identity", "conditions", "global_batch", "layout", "flags"):
            assert trainer[name] == run[name], name
    stored = read_run(whole)
    assert stored is not None
    assert stored.identity == RunIdentity.from_json(run["identity"])
    assert (stored.global_batch, stored.first_replicas) == (4, 1)


def test_a_finished_run_is_left_as_it_is(config: RunConfig, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert pretrain(config) == 0
    printed = capsys.readouterr().out
    assert "the run is finished" in printed
    assert "To go on: resume.py" in printed
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


@pytest.mark.parametrize(
    ("step", "total", "stop", "done"),
    [(4, 9, None, False), (4, 4, None, True), (4, 9, 4, True), (4, 9, 5, False), (4, 4, 9, True)],
)
def test_a_run_is_done_at_its_last_step_or_where_it_is_to_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int, total: int, stop: int | None, done: bool
) -> None:
    (tmp_path / "trainer.json").write_text(json.dumps({"step": step}))
    config = RunConfig(training=TrainingFlags(total), run=RunFlags(tmp_path, stop_at_step=stop))
    assert is_done(config, tmp_path, ProcessGroups.single()) == done
    assert ("nothing was done" in capsys.readouterr().out) == done


@pytest.mark.parametrize(
    ("total", "stop", "message"),
    [
        (3, None, "total_steps=3 is before step 4, where the run is; legal: more than 4"),
        (9, 3, "stop_at_step=3 is before step 4, where the run is; legal: more than 4"),
        (4, 3, "stop_at_step=3 is before step 4, where the run is; legal: none, as the run is finished; to go on: "),
    ],
)
def test_a_stop_that_the_run_is_past_is_refused(tmp_path: Path, total: int, stop: int | None, message: str) -> None:
    (tmp_path / "trainer.json").write_text('{"step": 4}')
    config = RunConfig(training=TrainingFlags(total), run=RunFlags(tmp_path, stop_at_step=stop))
    with pytest.raises(ArgonneError) as refusal:
        is_done(config, tmp_path, ProcessGroups.single())
    assert str(refusal.value).startswith(message)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_left(config: RunConfig, begun: Path) -> None:
    (begun / "step_00000002" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints in output_dir=.* is valid"):
        pretrain(stopping(config, None, begun))
    assert len(history(begun)) == 2


def test_what_has_changed_is_kept_with_the_run(
    config: RunConfig, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other data, accepted: its lanes find places, the change is announced and recorded with its step."""
    corpus = Path((config.data.data_glob or ("",))[0]).parent
    other = begun.parent / "corpus"
    shutil.copytree(corpus, other)
    (other / "part-2.parquet").unlink()
    data = replace(config.data, data_glob=(f"{other}/*.parquet",), accept_data_change=True, on_bad_shard="skip")
    assert pretrain(stopping(replace(config, data=data), 3, begun)) == 0
    printed = capsys.readouterr().out
    assert "accepted from here on: data.shards: shard part-2.parquet was removed" in printed
    assert "the data has changed since step_00000002: " in printed
    assert "changed from here on: on_bad_shard: raise -> skip" in printed
    told = json.loads((begun / "step_00000003" / "trainer.json").read_text())["changes"]
    assert [change["step"] for change in told] == [2, 2]
    assert told[0]["text"].startswith("data.shards: shard part-2.parquet was removed")
    assert told[1]["text"] == "on_bad_shard: raise -> skip"


def resumed(directory: Path, *words: str) -> Any:
    """The flags of a resume, without what the command line itself says."""
    return parse_resume(["--checkpoint-path", str(directory), "--device=cpu", *words])


def test_a_resume_has_the_saved_flags_but_for_those_it_names(config: RunConfig, begun: Path) -> None:
    found = resumed(begun, "--learning-rate", "0.5", "--no-streaming", "--batch-size", "1")
    assert found.training == replace(config.training, learning_rate=0.5, initial_batch_size=1)
    assert found.data == replace(config.data, streaming=False)
    assert found.model == config.model
    assert found.run == replace(config.run, output_dir=begun, stop_at_step=None)
    assert found.given == {"checkpoint_path", "device", "learning_rate", "streaming", "batch_size"}


def test_a_flag_that_is_named_as_it_was_saved_is_given_all_the_same(begun: Path) -> None:
    found = resumed(begun, "--learning-rate", "0.01", "--save-interval=2")
    assert found.training.learning_rate == 0.01
    assert {"learning_rate", "save_interval"} <= found.given


def test_a_tokenizer_that_is_gone_is_taken_from_the_checkpoint(config: RunConfig, begun: Path) -> None:
    path = begun / "step_00000002" / "trainer.json"
    kept = str(config.data.tokenizer_path)
    path.write_text(path.read_text().replace(json.dumps(kept), json.dumps(kept + "-gone")))
    with pytest.raises(CheckpointError, match="trainer.json"):  # its checksum is of what was there
        resumed(begun)
    shutil.move(kept, kept + "-away")
    try:
        path.write_text(path.read_text().replace(json.dumps(kept + "-gone"), json.dumps(kept)))
        assert resumed(begun).data.tokenizer_path == begun / "step_00000002"
        assert resumed(begun, "--tokenizer-path=/t").data.tokenizer_path == Path("/t")
    finally:
        shutil.move(kept + "-away", kept)


def test_a_resume_resets_the_optimizer_and_records_it(
    begun: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--reset-optimizer", "--rewarmup-steps=2", "--stop-at-step=3")
    assert resume(resumed(begun, *words)) == 0
    assert "changed from here on: optimizer: reset, with 2 steps of warm-up" in capsys.readouterr().out
    told = json.loads((begun / "step_00000003" / "trainer.json").read_text())
    assert told["changes"] == [{"step": 2, "text": "optimizer: reset, with 2 steps of warm-up"}]
    assert told["schedule"]["rewarmup_after"] == 2
    assert history(begun)[2]["loss"] == history(whole)[2]["loss"], "the weights are those of the checkpoint"


def test_a_resume_from_before_a_damaged_checkpoint_has_the_flags_of_both_commands(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is named counts, and what is not is as the checkpoint says that the run goes on from."""
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "step_00000004" / "model-00001-of-00001.safetensors").write_bytes(b"damaged")
    assert resume(resumed(run, "--total-steps=9", "--stop-at-step=3", "--weight-decay", "0.3")) == 0
    assert "continuing from " + str(run / "step_00000002") in capsys.readouterr().out
    told = json.loads((run / "step_00000003" / "trainer.json").read_text())
    schedule = told["identity"]["schedule"]
    assert (schedule["total_steps"], schedule["weight_decay"], schedule["learning_rate"]) == (9, 0.3, 0.01)


@pytest.mark.parametrize(
    ("assignment", "lanes", "note"),
    [
        (Assignment(2, 3, 2), 4, None),
        (Assignment(2, 2, 3), 8, "data_parallel=3 does not divide the 8 lanes: each is tokenised by 3 ranks"),
        (
            Assignment(2, 2, 6, "strided"),
            8,
            "data_parallel=6 does not divide the 8 lanes: each is tokenised by 3 ranks",
        ),
        (Assignment(2, 4, 2, "contiguous"), 16, None),
        (
            Assignment(2, 4, 4, "contiguous"),
            8,
            "16 micro-batches of a step do not divide the 8 lanes: each is tokenised by 2 ranks",
        ),
    ],
    ids=str,
)
def test_a_run_tells_how_many_ranks_tokenise_each_lane_where_it_is_not_one(
    config: RunConfig, assignment: Assignment, lanes: int, note: str | None
) -> None:
    assert lanes_note(config, lanes, assignment) == ([f"{note}, which take its samples in turn"] if note else [])
    cached = replace(config, data=replace(config.data, streaming=False))
    assert lanes_note(cached, lanes, assignment) == []
