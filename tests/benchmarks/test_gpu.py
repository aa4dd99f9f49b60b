"""``make gpu``: parts that are cut off and go on, a budget, what is next, and a machine that lacks things."""

from __future__ import annotations

import json
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, kept, wheels
from benchmarks.gpu import Refusal, main, run, run_part
from benchmarks.gpu_parts import PARTS, Part
from benchmarks.gpu_plan import Machine, Plan
from benchmarks.jobs import runs
from benchmarks.kept import Kept

IDENTITY = {"gpu": "a GPU", "torch": "2.11.0", "triton": "3.6.0", "sources": "1"}
MACHINE = Machine(1, IDENTITY)
BENCHMARK = f"""
import json, os, signal, sys
from pathlib import Path
from benchmarks.kept import Kept
words = sys.argv[1:]
kept = Kept(Path(words[words.index("--output") + 1]), {IDENTITY}, {{}}, "--resume" in words)
kept.measured("a", lambda: print("measured a") or 1)
if len(sys.argv) > 4 and not Path(sys.argv[1]).exists():
    Path(sys.argv[1]).touch()
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
kept.measured("b", lambda: print("measured b") or 2)
kept.end()
"""


@pytest.fixture
def parts(tmp_path: Path) -> list[Part]:
    """One that is killed between its two cases the first time, and two that need more."""
    script = tmp_path / "benchmark.py"
    script.write_text(BENCHMARK)
    first = Part("first", "a and b", 2, ((str(script), str(tmp_path / "was-killed")),), output="first_{device}.json")
    first = replace(first, needs=())
    return [first, replace(first, name="second", needs=("tyro",), output=None), replace(first, name="two", gpus=2)]


@pytest.fixture
def plan(parts: list[Part], tmp_path: Path) -> Plan:
    return Plan(parts, MACHINE, tmp_path)


def test_a_part_that_was_killed_goes_on_with_the_cases_that_are_missing(
    plan: Plan, capfd: pytest.CaptureFixture[str]
) -> None:
    part = plan.parts[0]
    assert plan.headline().startswith("next: PART=1 (a and b), done 0 of 2, about 2 min; all that is left about 4 min")
    assert run_part(part, plan, 60) == "failed with status -9"
    assert json.loads(plan.path(part).read_text())["cases"] == {"a": 1}
    assert plan.headline().startswith("next: PART=1 (a and b, 1 cases are there), done 0 of 2")
    assert run_part(part, plan, 60) == "done"
    assert capfd.readouterr().out.count("measured") == 2
    assert plan.headline() == "next: PART=2 (a and b), done 1 of 2, about 2 min"
    elsewhere = replace(plan, machine=Machine(1, IDENTITY | {"gpu": "another GPU"}))
    assert elsewhere.headline().startswith("next: PART=1 (a and b), done 0 of 2")


def test_a_part_of_commands_goes_on_with_those_that_have_not_ended(
    plan: Plan, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ends = (
        ("-c", "print('ran once')"),
        ("-c", f"import sys; sys.exit(not __import__('os').path.exists('{tmp_path}/x'))"),
    )
    part = replace(plan.parts[1], commands=ends)
    assert run_part(part, plan, 60) == "failed with status 1"
    (tmp_path / "x").touch()
    assert run_part(part, plan, 60) == "done"
    assert capfd.readouterr().out.count("\nran once\n") == 1
    assert plan.is_done(part)


def test_what_runs_too_long_is_ended_and_so_is_what_it_has_left_behind(plan: Plan, tmp_path: Path) -> None:
    assert run(["-c", "while True: pass"], time.monotonic(), plan) is None
    leaves = "import subprocess; left = subprocess.Popen(['sleep', '600']); open(r'{}', 'w').write(str(left.pid))"
    assert run(["-c", leaves.format(tmp_path / "pid")], time.monotonic() + 60, plan) == 0
    left = int((tmp_path / "pid").read_text())
    ends = time.monotonic() + 20
    while runs(left) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not runs(left)


@pytest.mark.parametrize(
    ("budget", "outcomes", "expected", "status"),
    [
        (28, ["done", "done", "done"], "123", 0),
        (28, ["cut off, and", "done", "done", "done"], "1231", 0),
        (28, ["failed with status 2", "done, with status 1", "done"], "123", 1),
        (12, ["done", "done", "done"], "12", 0),  # each takes all of its eight minutes
        (8.2, ["cut off, and"], "1", 0),
    ],
)
def test_parts_run_in_order_within_the_budget(
    budget: float, outcomes: list[str], expected: str, status: int, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, ran = [0.0], []
    parts = [replace(plan.parts[0], name=name) for name in "123"]

    def pretend(part: Part, plan: Plan, seconds: float) -> str:
        now[0] += seconds
        ran.append((part.name, seconds))
        return outcomes[len(ran) - 1]

    monkeypatch.setattr(gpu, "run_part", pretend)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    words = ["--budget", str(budget), "--results", str(plan.results)]
    assert main(words, parts, lambda: MACHINE) == status
    assert "".join(name for name, _ in ran) == expected
    assert all(seconds <= 480 for _, seconds in ran)
    assert now[0] <= 60 * budget


def test_the_first_line_says_what_is_next_and_the_second_what_is_missing(
    parts: list[Part], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = Machine(1, IDENTITY, {"tyro": "no benchmark runs", "liger_kernel": "one rival less"})
    assert main(["--plan", "--results", str(tmp_path)], parts, lambda: lacking) == 0
    first, second, *lines = capsys.readouterr().out.splitlines()
    assert first == "next: PART=1 (a and b), done 0 of 1, about 2 min"
    assert second == "missing: tyro (no benchmark runs); liger_kernel (one rival less)"
    assert [words in line for words, line in zip(("not begun", "needs tyro", "needs 2 GPUs"), lines, strict=True)]


@pytest.mark.parametrize(
    ("words", "machine", "told"),
    [
        (["--part", "18"], MACHINE, "part='18' is not known; legal: 1 to 3, or first, second, two"),
        (["--part", "two"], MACHINE, r"PART=3 \(two\) needs 2 GPUs, which this machine lacks"),
        (["--budget", "0"], MACHINE, "budget=0.0 is not legal; legal: a number of minutes, more than 0"),
        (["--rehearse", "maybe"], MACHINE, "maybe"),
        ([], Machine(0, IDENTITY), "torch.cuda.is_available\\(\\) is False; legal: a machine with an NVIDIA GPU"),
        ([], Machine(0, IDENTITY, {}, "No module named 'torch'"), "No module named 'torch'; legal: a machine with"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(
    words: list[str], machine: Machine, told: str, parts: list[Part], tmp_path: Path
) -> None:
    with pytest.raises(Refusal, match=told):
        main([*words, "--results", str(tmp_path)], parts, lambda: machine)


def test_cases_of_something_else_are_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cases.json"

    def measured(resume: bool = True, **identity: Any) -> int:
        return Kept(path, {**IDENTITY, **identity}, {}, resume).measured("a", next_one)

    numbers = iter(range(9))
    next_one: Callable[[], int] = lambda: next(numbers)  # noqa: E731 - one value each time
    assert [measured(), measured(), measured(resume=False), measured()] == [0, 0, 1, 1]
    assert [measured(settings={"rounds": 1}), measured(settings={"rounds": 1})] == [2, 2]
    assert capsys.readouterr().out == "cases.json is of other settings: measured anew\n"
    path.write_text("{")
    assert measured() == 3
    assert kept.sources("argonne") != kept.sources("benchmarks")


def test_what_is_missing_comes_from_wheels_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    made, site = tmp_path / "wheels", tmp_path / "site"
    made.mkdir()
    for name, tag in (("laid_beside", "py3-none-any"), ("of_another", "cp27-cp27m-win32"), ("torch", "py3-none-any")):
        with zipfile.ZipFile(made / f"{name}-0.1-{tag}.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "")
            wheel.writestr(f"{name}-0.1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
            wheel.writestr(f"{name}-0.1.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
            wheel.writestr(f"{name}-0.1.dist-info/RECORD", "")
    monkeypatch.setattr(wheels, "WANTED", {"laid_beside": "a", "of_another": "b", "torch": "c"})
    assert list(wheels.missing()) == ["laid_beside", "of_another"]
    told = wheels.install(made, site)
    assert told is not None
    assert told.startswith(f"not installed from {made}: of-another (")
    assert list(wheels.missing()) == ["of_another"]
    spec = find_spec("laid_beside")
    assert spec is not None
    assert spec.origin == str(site / "laid_beside.py")
    assert not (site / "torch.py").exists()
    assert wheels.install(tmp_path / "nowhere", site) == f"WHEELS={tmp_path / 'nowhere'} is not a directory"


def test_every_part_can_be_rehearsed_and_fits_its_time(tmp_path: Path) -> None:
    plan = Plan(PARTS, Machine(1, IDENTITY), tmp_path, "cpu")
    assert len({part.name for part in PARTS} | {part.file for part in PARTS}) == 2 * len(PARTS)
    for part in PARTS:
        assert part.minutes <= gpu.PART_MINUTES
        for number in range(len(part.commands)):
            words = plan.words(part, number)
            assert not any("{" in word for word in words)
            assert words[0] in ("-m", "benchmarks/generate.py") or (kept.ROOT / words[0]).is_file()
        if part.gpus == 1:
            assert words[-len(part.rehearsal) :] == list(part.rehearsal) or not part.rehearsal
