"""The README's examples in Python run as printed, and keep what their comments promise."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.integration.runs import ROOT, finish, start

README = (ROOT / "README.md").read_text()


def test_the_example_prints_the_same_norm_at_every_layout(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(import torch\nfrom argonne\.parallel.*?)```", README, re.S)
    two, one = tmp_path / "two.py", tmp_path / "one.py"
    two.write_text(code)
    one.write_text(code.replace("Layout(tensor=2)", "Layout()"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    sharded = finish(start([*launcher, str(two)]))
    dense = finish(start([sys.executable, str(one)]))
    assert sharded.status == dense.status == 0, sharded.output + dense.output
    norms = re.findall(r"tensor\((\d+\.\d+)", sharded.output)
    assert len(norms) == 2
    assert {*norms} == {*re.findall(r"tensor\((\d+\.\d+)", dense.output)}


def test_extras_are_installed_from_the_repository_since_no_index_has_this_project() -> None:
    texts = [path for folder in ("argonne", "benchmarks", "docs", "examples") for path in (ROOT / folder).rglob("*.*")]
    told = {
        path.name: found
        for path in [ROOT / "README.md", *texts]
        if path.suffix in (".md", ".py")
        and (found := re.findall(r"install [^\n]*argonne\b[^\n]*", path.read_text(encoding="utf-8")))
    }
    assert not told
