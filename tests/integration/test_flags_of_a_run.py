"""Flags of the loss, the optimizer and the data hold for the whole life of a run, and are part of what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.integration.runs import (
    MODEL,
    SCHEDULE,
    command,
    history,
    kill_job,
    metrics,
    run,
    start,
    succeed,
    wait_for_steps,
    weights,
    write_corpus,
)

pytestmark = pytest.mark.slow

OTHER = {
    "--text-column": "body",
    "--filter-min-tokens": 60,
    "--filter-max-digits": 0.2,
    "--optimizer": "muon",
    "--muon-momentum": 0.8,
    "--muon-precision": "bf16",
    "--adam-beta1": 0.7,
    "--adam-beta2": 0.99,
    "--adam-epsilon": 1e-4,
    "--label-smoothing": 0.1,
    "--z-loss": 1e-3,
    "--schedule": "linear",
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run at TP 2 whose corpus has its texts in another column, and some of them full of digits."""
    folder = write_corpus(tmp_path_factory.mktemp("flags") / "corpus")
    for path in folder.iterdir():
        table = pq.read_table(path).rename_columns(["id", "body"])
        rows = ["".join("12345"[ord(c) % 5] if c < "f" else c for c in text) if n % 3 else text
                for n, text in enumerate(table["body"].to_pylist())]  # fmt: skip
        pq.write_table(table.set_column(1, "body", [rows]), path, row_group_size=7)
    data = {"--data-glob": f"{folder}/part-0.parquet", "--validation-glob": f"{folder}/part-1.parquet"}
    return {**MODEL, **SCHEDULE, **data, **OTHER, "--validation-sequences": 8, "--precision": "fp64"}


@pytest.fixture(scope="module")
def undisturbed(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """By the command line but for ``OTHER``, which a file says."""
    directory = tmp_path_factory.mktemp("undisturbed")
    file = directory.parent / "other.json"
    file.write_text(json.dumps({name.removeprefix("--"): value for name, value in OTHER.items()}))
    flags = {**{name: value for name, value in flags.items() if name not in OTHER}, "--config": file}
    vain = {"--num-proc": 3, "--min-batch-size": 4, "--disable-compile": None, "--trust-remote-code": None}
    return directory, succeed("pretrain", {**flags, **vain, "--local_rank": 0, "--output-dir": directory})


def test_a_run_with_flags_of_its_own_is_killed_and_continued_to_the_bit(
    flags: dict[str, Any], undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    """By ``resume.py``, which is told none of them."""
    whole, _ = undisturbed
    process = start(command("pretrain", {**flags, "--output-dir": tmp_path}))
    wait_for_steps(process, tmp_path, 6)
    kill_job(process)
    process.communicate()
    succeed("resume", {"--checkpoint-path": tmp_path})
    assert history(tmp_path) == history(whole)
    assert weights(tmp_path) == weights(whole)
    saved = json.loads((tmp_path / "step_00000012" / "trainer.json").read_text())
    assert saved["changes"] == []
    assert saved["identity"]["data"]["filters"] == {
        "long_characters": 50, "max_digits": 0.2, "min_readable": 0.3, "min_tokens": 60
    }  # fmt: skip
    assert saved["identity"]["schedule"]["adam_beta2"] == 0.99


def test_what_a_run_is_told_in_vain_is_said_once_as_it_begins(undisturbed: tuple[Path, str]) -> None:
    _, output = undisturbed
    for flag in ("--num-proc", "--min-batch-size", "--disable-compile", "--trust-remote-code", "--local_rank"):
        assert output.count(f"note: {flag} has no effect: ") == 1, output
    assert output.count("note: ") == 5, output


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--label-smoothing", "schedule.label_smoothing: 0.1 -> 0.0); legal: the run's own flags"),
        ("--filter-min-tokens", "data.filters.min_tokens: 60 -> 10); legal: the run's own flags"),
    ],
)
def test_the_same_command_without_one_of_them_is_another_run(
    flags: dict[str, Any], undisturbed: tuple[Path, str], flag: str, expected: str
) -> None:
    """Refused, naming what differs, with nothing written; of the data, it may be accepted on purpose."""
    directory, _ = undisturbed
    before = metrics(directory)
    done = run("pretrain", {**{name: flags[name] for name in flags if name != flag}, "--output-dir": directory})
    assert done.status not in (0, -9), done.output
    assert f"holds a different run ({expected}" in done.output
    assert ("--accept-data-change" in done.output) == flag.startswith("--filter")
    assert metrics(directory) == before


def test_a_resume_changes_the_optimizer_on_purpose_and_says_so(undisturbed: tuple[Path, str], tmp_path: Path) -> None:
    directory, _ = undisturbed
    changed = {"--adam-beta2": 0.9, "--label-smoothing": 0, "--total-steps": 10, "--output-dir": tmp_path}
    reset = {"--optimizer": "adamw", "--reset-optimizer": None}
    told = succeed("resume", {"--checkpoint-path": directory / "step_00000008", **changed, **reset})
    lines = (
        "schedule.adam_beta2: 0.99 -> 0.9",
        "schedule.label_smoothing: 0.1 -> 0.0",
        "schedule.optimizer: muon -> adamw",
        "optimizer: reset, with 100 steps of warm-up",
    )
    for line in lines:
        assert f"changed from here on: {line}" in told
    assert metrics(tmp_path)[-1]["loss"] != metrics(directory)[9]["loss"]
    refused = run("resume", {"--checkpoint-path": directory, "--filter-min-tokens": 50, "--total-steps": 14})
    assert refused.status not in (0, -9), refused.output
    assert "data.filters.min_tokens: 60 -> 50" in refused.output
