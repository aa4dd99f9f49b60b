"""The README's example of the parallel layer runs as printed, and keeps what its comments promise."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.integration.runs import ROOT, finish, start


def test_the_example_prints_the_same_norm_at_every_layout(tmp_path: Path) -> None:
    (code,) = re.findall(
        r"```python\n(import torch\nfrom argonne\.parallel.*?)```", (ROOT / "README.md").read_text(), re.S
    )
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
