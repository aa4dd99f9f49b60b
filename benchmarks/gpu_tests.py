"""Every test that needs a GPU, each kept as soon as it has ended: ``python -m benchmarks.gpu_tests``.

Files without such a test are not collected: a machine with a GPU may lack what they import. It is a plugin of pytest
too, which leaves out the tests that have ended before, in the processes that run tests beside each other as well.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a start as a script

from benchmarks.kept import ROOT, Kept, sources, where

ENDED = "ARGONNE_TESTS_ENDED"
"""Tells where a list of tests is that are not to be run again."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has ended."""
    if path := os.environ.get(ENDED):
        ended = set(json.loads(Path(path).read_text(encoding="utf-8")))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in ended])
        items[:] = [item for item in items if item.nodeid not in ended]


class Keeper:
    """Keeps how each test ends."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self.running: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = self.running.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        found["seconds"] += report.duration
        if report.outcome != "passed" and found["outcome"] != "failed":
            found["outcome"] = report.outcome
            crash = getattr(report.longrepr, "reprcrash", None)
            found["why"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else crash)[:300]
        if report.when == "teardown":
            self.kept.keep(report.nodeid, self.running.pop(report.nodeid))


def files_with_gpu_tests() -> list[str]:
    """Those that mention the marker."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in found if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]


def main(words: list[str]) -> int:
    """Run what has not ended yet; the exit status, 1 if any has failed, now or before."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_tests_cuda.json")
    parser.add_argument("--resume", action="store_true", help="leave out what the output has of this machine")
    parser.add_argument("--workers", type=int, default=0, help="processes, where pytest-xdist is there")
    parser.add_argument("--select", nargs="+", help="files in place of those that need a GPU")
    parser.add_argument("-k", default="", help="tests of these names")
    flags = parser.parse_args(words)
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    identity = where(gpu) | {"tests": sources("tests"), "selected": [flags.select, flags.k]}
    kept = Kept(flags.output, identity, {"benchmark": "gpu_tests"}, flags.resume)
    beside = ["--numprocesses", str(flags.workers)] if flags.workers and find_spec("xdist") else []
    chosen = flags.select or [*files_with_gpu_tests(), "-m", "gpu"]
    options = ["-p", "no:cacheprovider", "-p", "benchmarks.gpu_tests", "--continue-on-collection-errors"]
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as ended:
        json.dump(list(kept.cases), ended)
        ended.flush()
        os.environ[ENDED] = ended.name
        os.chdir(ROOT)
        status = pytest.main([*options, *beside, *chosen, *(["-k", flags.k] if flags.k else [])], [Keeper(kept)])
    counts = Counter(case["outcome"] for case in kept.cases.values())
    for name, case in kept.cases.items():
        if case["outcome"] == "failed":
            print(f"failed: {name}: {case['why']}")
    print(", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) or "no test has ended")
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        return int(status)
    if not kept.cases:
        return int(pytest.ExitCode.NO_TESTS_COLLECTED)
    kept.end(counts["failed"], outcomes=dict(counts))
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
