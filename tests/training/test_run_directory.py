"""A run's directory: what the run is, and a tidy past on continuing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from argonne.checkpoint import checkpoints
from argonne.parallel import ArgonneError
from argonne.training.report import Reports
from argonne.training.run.continuation import continue_at
from argonne.training.run.directory import read_run
from argonne.training.run.file import StoredRun
from argonne.training.run.identity import RunIdentity


def fake_checkpoint(root: Path, step: int) -> Path:
    path = root / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")
    return path


def test_run_json_is_read_where_there_is_a_run(tmp_path: Path) -> None:
    assert read_run(tmp_path / "nowhere") is None
    assert read_run(tmp_path) is None
    run = {"identity": {"seed": 3}, "global_batch": 4, "first_layout": {"data": 1}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert read_run(tmp_path) == StoredRun(RunIdentity(seed=3), 4, {"data": 1})
    for damaged in ('{"identity": ', "{}", "[]", "3"):
        (tmp_path / "run.json").write_text(damaged)
        with pytest.raises(ArgonneError, match="run.json' does not tell what the run is"):
            read_run(tmp_path)


def test_checkpoints_without_run_json_are_refused(tmp_path: Path) -> None:
    fake_checkpoint(tmp_path, 5)
    with pytest.raises(ArgonneError, match="holds checkpoints but no run.json"):
        read_run(tmp_path)


SAMPLES = "# Samples\n\n" + "".join(f"## Step {n} (loss {n})\n\n> text {n}\n> ## Step 99\n\n" for n in (5, 10, 15))


@pytest.fixture
def reports(tmp_path: Path) -> Reports:
    return Reports(tmp_path)


def test_continuing_drops_all_that_tells_of_steps_past_it_and_sets_their_checkpoints_aside(
    tmp_path: Path, reports: Reports
) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 18)))
    (tmp_path / "samples.md").write_text(SAMPLES)
    (tmp_path / "loss.png").write_text("up to step 17")
    (tmp_path / "stats").mkdir()
    for step in (5, 10, 15):
        fake_checkpoint(tmp_path, step)
        (tmp_path / "stats" / f"step_{step:08d}.json").write_text("{}")
    (tmp_path / "stats" / "step_123456789.json").write_text("{}")
    for left in ("stats/step_00000017.json.tmp", "run.json.tmp", "loss.png.tmp", "metrics.jsonl.tmp"):
        (tmp_path / left).write_text("{")
    for own in ("stats/notes.json", "stats/step_x.json", "notes.tmp"):
        (tmp_path / own).write_text("of the user")
    lines = continue_at(tmp_path, 10, reports)
    assert lines == [
        "checkpoint step_00000015 lies past step 10 and was set aside as step_00000015.set-aside",
    ]
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(f'{{"step": {step}}}\n' for step in range(1, 11))
    assert (tmp_path / "samples.md").read_text() == SAMPLES[: SAMPLES.index("## Step 15")]
    stats = ["notes.json", "step_00000005.json", "step_00000010.json", "step_x.json"]
    assert sorted(path.name for path in (tmp_path / "stats").iterdir()) == stats
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000005", "step_00000010"]
    assert (tmp_path / "step_00000015.set-aside" / "manifest.json").exists()
    left = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert left == {"metrics.jsonl", "samples.md", "notes.tmp"}


def test_a_plot_that_tells_of_nothing_past_the_step_stays(tmp_path: Path, reports: Reports) -> None:
    for name in ("metrics.jsonl", "loss.png"):
        (tmp_path / name).write_text('{"step": 3}\n')
    continue_at(tmp_path, 3, reports)
    assert (tmp_path / "loss.png").exists()


def test_a_run_that_begins_again_begins_its_reports_again(tmp_path: Path, reports: Reports) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "samples.md").write_text(SAMPLES)
    (tmp_path / "stats").mkdir()
    (tmp_path / "stats" / "step_00000002.json").write_text("{}")
    continue_at(tmp_path, 0, reports)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert (tmp_path / "samples.md").read_text() == "# Samples\n\n"
    assert list((tmp_path / "stats").iterdir()) == []


def test_what_stands_in_the_place_of_a_report_is_set_aside(tmp_path: Path, reports: Reports) -> None:
    for name in ("metrics.jsonl", "samples.md", "loss.png"):
        (tmp_path / name).mkdir()
    (tmp_path / "stats").write_text("a file")
    told = continue_at(tmp_path, 4, reports)
    for name in ("metrics.jsonl", "samples.md", "loss.png", "stats"):
        assert f"{name} is no report of a run and was set aside as {name}.set-aside" in told
        assert (tmp_path / f"{name}.set-aside").exists()
        assert not (tmp_path / name).exists()


def test_reports_that_cannot_be_tidied_stop_no_run(
    tmp_path: Path, reports: Reports, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(step: int) -> None:
        raise OSError(5, "Input/output error", "metrics.jsonl")

    monkeypatch.setattr(reports.metrics, "drop_after", fail)
    assert continue_at(tmp_path, 4, reports) == []
    told = capsys.readouterr().err
    assert told.count("Input/output error") == 1
    assert "Traceback" not in told


def test_a_checkpoint_set_aside_again_replaces_none_that_was_before(tmp_path: Path, reports: Reports) -> None:
    for _ in range(3):
        fake_checkpoint(tmp_path, 7)
        continue_at(tmp_path, 2, reports)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_00000007.set-aside", "step_00000007.set-aside-2", "step_00000007.set-aside-3"]


def test_continuing_in_a_directory_with_nothing_to_tidy_changes_nothing(tmp_path: Path, reports: Reports) -> None:
    assert continue_at(tmp_path, 0, reports) == []
    assert list(tmp_path.iterdir()) == []
