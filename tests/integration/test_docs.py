"""Every program in docs/ runs as its first line says, and prints what the page says it prints."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.integration.runs import ROOT, finish, start

pytestmark = pytest.mark.slow

PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PROGRAM = re.compile(r"^```python\n(# (.*?)(\w+)\.py\n.*?)^```\n\n```output\n(.*?)^```$", re.M | re.S)
PROGRAMS = [program for text in PAGES.values() for program in PROGRAM.findall(text)]
LAUNCHERS = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}


def without_times(text: str) -> list[str]:
    return re.sub(r" *\d+\.\d{3} \.\. +\d+\.\d{3} ms", "(when)", text).splitlines()


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_python_is_a_program_with_its_output(page: str) -> None:
    assert len(PROGRAM.findall(PAGES[page])) == PAGES[page].count("```python\n")
    assert PROGRAM.findall(PAGES[page]) or page not in ("parallel.md", "reuse.md", "your-model.md")


@pytest.mark.parametrize(("code", "command", "name", "output"), PROGRAMS, ids=[name for _, _, name, _ in PROGRAMS])
def test_program_prints_what_the_page_says(tmp_path: Path, code: str, command: str, name: str, output: str) -> None:
    launcher, *flags = command.split()
    script = tmp_path / f"{name}.py"
    script.write_text(code)
    done = finish(start([*LAUNCHERS[launcher], *flags, str(script)]))
    assert done.status == 0, done.output
    assert without_times(done.output) == without_times(output)
