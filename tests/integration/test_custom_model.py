"""A model that is not ours, trained by a loop of its own on ``argonne.parallel``, is the same at every layout."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.integration.runs import ROOT, run, succeed

STEPS = 20


@pytest.fixture(scope="module")
def dense() -> list[float]:
    return losses({}, nproc=1)


def losses(flags: dict[str, Any], nproc: int, torchrun: bool = False) -> list[float]:
    output = succeed("custom_model", {"--dtype": "float64", "--steps": STEPS, **flags}, nproc, torchrun)
    return [float(loss) for loss in re.findall(r"^step \d+ \| loss (\d+\.\d{10}) \|", output, re.M)]


def test_dense_losses_fall(dense: list[float]) -> None:
    assert len(dense) == STEPS
    assert sum(dense[-3:]) / 3 < 0.6 * dense[0]


@pytest.mark.parametrize(
    ("flags", "torchrun"), [({}, True), ({"--sequence-parallel": None}, False)], ids=["tensor", "sequence"]
)
def test_losses_of_two_ranks_equal_dense(dense: list[float], flags: dict[str, Any], torchrun: bool) -> None:
    assert losses(flags, 2, torchrun) == pytest.approx(dense, rel=1e-9, abs=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--frobnicate": 1}, "--frobnicate"),
        ({"--heads": 3}, "hidden=64 is not a multiple of 8 * heads=24"),
        ({"--heads": 1}, "heads=1 is not legal; legal: 2 or more"),
    ],
    ids=["unknown flag", "hidden", "heads"],
)
def test_bad_flags_are_refused_in_one_line(flags: dict[str, Any], message: str) -> None:
    done = run("custom_model", flags, nproc=2)
    assert done.status == 2, done.output
    assert done.output.count("\n") == 1, done.output
    assert done.output.startswith("argonne: error: ")
    assert message in done.output


def test_a_shape_that_a_layer_refuses_is_told_by_one_rank() -> None:
    done = run("custom_model", {"--hidden": 32}, nproc=3)
    assert done.status == 2, done.output
    errors = [line for line in done.output.splitlines() if line.startswith("argonne: error: ")]
    assert len(errors) == 1, done.output
    assert "out_features=128 is not divisible by tensor_parallel=3; legal sizes: 1, 2, 4, 8" in errors[0]


def test_the_example_is_short_and_takes_only_what_each_of_its_ways_needs() -> None:
    """The layer, the launcher and what makes a model trainable by others; the workflow for the second way alone."""
    text = (ROOT / "examples" / "custom_model.py").read_text()
    assert text.count("\n") <= 175
    imports = [line for line in text.splitlines() if re.match(r"(from|import) argonne", line)]
    assert [line.split(" import ")[0] for line in imports] == [
        "from argonne",
        "from argonne.launch",
        "from argonne.models",
    ]
    assert "from argonne import parallel" in imports
    (second,) = re.findall(r"^def workflow\(.*?\n(?=\n\n)", text, re.M | re.S)
    assert second.count("\n") <= 40
    assert text.count("argonne.training") == second.count("argonne.training")
