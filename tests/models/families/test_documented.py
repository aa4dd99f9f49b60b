"""docs/models.md shows the file of Qwen3 as it is."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_worked_example_is_the_file() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    shown = page.partition("```py\n")[2].partition("```\n")[0]
    assert shown == (ROOT / "argonne" / "models" / "families" / "qwen3.py").read_text(encoding="utf-8")
