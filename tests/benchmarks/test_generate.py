"""benchmarks/generate.py: what it refuses, and a run of it to the end on a small model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from argonne.launch import LaunchFlags
from argonne.models import ArgonneConfig
from argonne.parallel import ArgonneError
from benchmarks.generate import Flags, check, main, random_weights

CONFIG = ArgonneConfig(16, 2, 4, 2, 1000, 24, max_position_embeddings=64, initializer_range=0.5)
SMALL = Flags(launch=LaunchFlags("cpu"), prompt_tokens=4, new_tokens=3, context=9, rounds=1)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rounds": 0}, "rounds=0 is not legal; legal: 1 or more"),
        ({"new_tokens": 1}, "new_tokens=1 is not legal; legal: 2 or more"),
        ({"context": 2000}, "context=2000 is too long for a model of 1024 positions"),
        ({"preset": "none"}, "preset='none' is not known"),
    ],
)
def test_what_cannot_be_measured_is_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ArgonneError, match=words):
        check(replace(SMALL, **changed), 1)


def test_every_way_writes_the_same_and_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_weights(CONFIG, tmp_path / "model", torch.float32)
    flags = replace(SMALL, checkpoint_path=tmp_path / "model", output=tmp_path / "out.json")
    check(flags, 1)
    main(flags)
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found["ratios"]) == {"transformers / TP 1", "no cache / cache"}
    names = [row["name"] for row in found["contestants"]]
    assert names == ["TP 1", "transformers", "cache at 9", "no cache at 9"]
    assert all(row["first_token_milliseconds"] > 0 for row in found["contestants"])
    assert capsys.readouterr().out.startswith("transformers / TP 1: ")
