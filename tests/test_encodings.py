"""Every text file is opened with its encoding: the locale of a machine decides nothing."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATHS = ("read_text", "write_text")


def test_every_text_file_is_opened_with_its_encoding() -> None:
    found = []
    for folder in ("argonne", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                words = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                opens = (name == "open" and any(set(w) <= set("rwaxt+") for w in words if w)) or (
                    isinstance(node.func, ast.Attribute) and name in PATHS
                )
                if isinstance(node.func, ast.Attribute) and name == "open" and not node.args and not node.keywords:
                    opens = True  # path.open()
                if opens and "encoding" not in {k.arg for k in node.keywords} and "utf-8" not in words:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
