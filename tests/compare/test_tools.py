"""``python -m argonne``: what it offers, its statuses, and one line for what it cannot do."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from argonne.__main__ import TOOLS, main
from argonne.parallel import ArgonneError
from tests.compare.planted import one_ulp_up, plant
from tests.integration.runs import finish, start
from tests.warm import SERVERS, environment

BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no tool": ((), "no tool is named; legal: diff, verify"),
    "another tool": (("prove",), "tool 'prove' is not known; legal: diff, verify"),
    "a flag first": (("--fast", "verify"), "tool '--fast' is not known"),
    "no checkpoint": (("verify",), "CHECKPOINT"),
    "three checkpoints": (("verify", "{run}", "{run}", "{run}"), "{run}"),
    "an unknown flag": (("verify", "{run}", "--fast"), "--fast"),
    "nothing there": (("verify", "{none}"), "checkpoint path '{none}' does not exist"),
    "a name that no file can have": (("verify", "x" * 300), "File name too long"),
    "an empty directory": (("verify", "{empty}"), "'{empty}' holds no checkpoint"),
    "a file of a run": (("verify", "{run}/run.json"), "'{run}/run.json' is not part of a checkpoint"),
    "another that is none": (("verify", "{run}/step_00000004", "{empty}"), "'{empty}' holds no checkpoint"),
    "one run": (("diff", "{run}"), "RUN_B"),
    "no run": (("diff", "{run}", "{none}"), "run_b='{none}' is neither a run's directory (run.json) nor a checkpoint"),
    "an empty run": (("diff", "{empty}", "{run}"), "run_a='{empty}' is neither a run's directory (run.json) nor"),
    "a run and a checkpoint": (("diff", "{run}", "{run}/step_00000004"), "legal: two runs' directories, or two check"),
    "no step": (("diff", "{run}", "{other}"), "'{other}/metrics.jsonl' has no step"),
    "no metrics": (("diff", "{blank}", "{run}"), "'{blank}/metrics.jsonl' cannot be read: [Errno 2] No such file"),
}


def argonne(*words: Any) -> tuple[int, list[str]]:
    """The status of a process of its own, and the lines that it printed."""
    command = ["-m", "argonne", *map(str, words)]
    if sys.platform == "linux":
        status, output = SERVERS.run(command, environment(), timeout=300)
    else:
        done = finish(start([sys.executable, *command]))
        status, output = done.status, done.output
    return status, output.splitlines()


@pytest.fixture
def places(run_alone: Path, other_run: Path, tmp_path: Path) -> dict[str, Path]:
    blank = Path(shutil.copytree(other_run, tmp_path / "blank"))
    (blank / "metrics.jsonl").unlink()
    (other_run / "metrics.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    return {
        "run": run_alone,
        "other": other_run,
        "blank": blank,
        "empty": tmp_path / "empty",
        "none": tmp_path / "none",
    }


@pytest.mark.parametrize("name", BAD)
def test_what_a_tool_cannot_do_is_refused_in_one_line(places: dict[str, Path], name: str) -> None:
    words, expected = BAD[name]
    with pytest.raises(ArgonneError) as refusal:
        main([word.format(**places) for word in words])
    assert expected.format(**places) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("words", [("--help",), ("-h",)])
def test_the_tools_are_listed(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    main(words)
    listed = capsys.readouterr().out
    for name, tool in TOOLS.items():
        assert f"  {name}  " in listed
        assert tool.summary in listed


@pytest.mark.parametrize("name", TOOLS)
def test_each_tool_tells_its_words(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert not ended.value.code
    told = capsys.readouterr().out
    assert f"python -m argonne {name}" in told
    assert "The status is 1" in " ".join(told.replace("│", " ").split())


def test_the_status_of_a_process_says_how_it_ended(copy: Path) -> None:
    status, lines = argonne("verify", copy)
    assert (status, len(lines)) == (0, 1), lines
    plant(copy, "lm_head.weight", one_ulp_up((1, 1)))
    status, lines = argonne("verify", copy)
    assert (status, len(lines)) == (1, 2), lines
    status, lines = argonne("verify", copy / "nowhere")
    assert (status, lines) == (2, [f"argonne: error: checkpoint path {str(copy / 'nowhere')!r} does not exist"])
