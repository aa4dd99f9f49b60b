"""benchmarks/layouts.py: what it refuses, and a run of it to the end."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from argonne.parallel import ArgonneError
from benchmarks.layouts import Flags, check, contestants
from benchmarks.two import TwoOnCpu

SMALL = Flags(TwoOnCpu("cpu"), layers=4, hidden=16, heads=2, vocab=40, sequence=16, batch=4, rounds=1, steps=1)


@pytest.mark.parametrize(
    ("flags", "ranks", "words"),
    [
        (SMALL, 1, "nproc=1 has nothing to share out; legal: 2 or more"),
        (replace(SMALL, batch=3), 2, "batch=3 or sequence=16 cannot be shared out over 2 processes"),
        (replace(SMALL, sequence=18), 2, "batch=4 or sequence=18 cannot be shared out over 2 processes"),
        (replace(SMALL, layers=3), 2, "num_hidden_layers=3 is less than the 4 stages"),
        (replace(SMALL, heads=3), 2, "num_attention_heads=3"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(flags: Flags, ranks: int, words: str) -> None:
    with pytest.raises(ArgonneError, match=words):
        check(flags, ranks)


def test_every_layout_is_timed_and_written(tmp_path: Path) -> None:
    check(SMALL, 2)
    script = Path(__file__).parents[2] / "benchmarks" / "layouts.py"
    told = [f"--{name}={getattr(SMALL, name)}" for name in ("layers", "hidden", "heads", "vocab", "sequence", "batch")]
    words = [*told, "--rounds=2", "--steps=1", "--device=cpu", "--nproc=2", f"--output={tmp_path / 'out.json'}"]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found["layouts"]) == [contestant.name for contestant in contestants(2)]
    for name, facts in found["layouts"].items():
        assert len(facts["tokens_per_second"]) == 2, name
        assert (facts["bubble"] is None) == ("pipeline" not in name)
        assert name in done.stdout
