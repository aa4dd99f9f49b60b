"""A run whose paths begin with ``~`` is recorded so that it can be resumed from anywhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.integration.runs import MODEL, ROOT, SCHEDULE, finish, start, words_of, write_corpus


@pytest.mark.slow
def test_paths_below_the_home_directory_are_recorded_whole_and_resumed_from_elsewhere(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    write_corpus(home / "data")
    elsewhere.mkdir()
    flags = {**MODEL, **SCHEDULE, "--total-steps": 6, "--save-interval": 3, "--device": "cpu", "--nproc": 1}
    flags |= {"--data-glob": "~/data", "--validation-glob": "~/data/part-0.parquet", "--output-dir": "~/run"}
    begun = finish(
        start(
            [sys.executable, str(ROOT / "examples/pretrain.py"), *words_of({**flags, "--stop-at-step": 3})],
            HOME=str(home),
        )
    )
    assert begun.status == 0, begun.output
    assert not (ROOT / "~").exists()
    recorded = json.loads((home / "run" / "run.json").read_text())["flags"]
    assert recorded["data"]["data_glob"] == [f"{home}/data"]
    assert recorded["data"]["validation_glob"] == [f"{home}/data/part-0.parquet"]
    assert recorded["run"]["output_dir"] == str(home / "run")
    words = f"cd {elsewhere} && exec {sys.executable} {ROOT}/examples/resume.py --nproc 1 --device cpu"
    resumed = finish(start(["bash", "-c", f"{words} --checkpoint-path='~/run'"], HOME=str(home)))
    assert resumed.status == 0, resumed.output
    assert (home / "run" / "step_00000006").is_dir()
    assert not list(elsewhere.iterdir())
