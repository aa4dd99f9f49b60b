"""Every program in docs/parallel.md runs as its first line says, and prints what the page says it prints."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.integration.runs import ROOT, finish, start

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "parallel.md").read_text()
PROGRAMS = re.findall(r"^```python\n(# (.*?)(\w+)\.py\n.*?)^```\n\n```output\n(.*?)^```$", PAGE, re.M | re.S)
LAUNCHERS = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}


def without_times(text: str) -> list[str]:
    return re.sub(r" *\d+\.\d{3} \.\. +\d+\.\d{3} ms", "(when)", text).splitlines()


def test_every_block_of_python_is_a_program_with_its_output() -> None:
    assert len(PROGRAMS) == PAGE.count("```python\n") > 0


@pytest.mark.parametrize(("code", "command", "name", "output"), PROGRAMS, ids=[name for _, _, name, _ in PROGRAMS])
def test_program_prints_what_the_page_says(tmp_path: Path, code: str, command: str, name: str, output: str) -> None:
    launcher, *flags = command.split()
    script = tmp_path / f"{name}.py"
    script.write_text(code)
    done = finish(start([*LAUNCHERS[launcher], *flags, str(script)]))
    assert done.status == 0, done.output
    assert without_times(done.output) == without_times(output)
