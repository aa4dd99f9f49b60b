"""Damage to a checkpoint or to a file beside it: passed over, or mended from a checkpoint, and said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from argonne.parallel import ArgonneError
from argonne.training.config import DataFlags, ModelFlags, RunConfig
from argonne.training.run.checks import check
from argonne.training.run.directory import read_run
from argonne.training.run.resume import parse_resume
from tests.integration.runs import MODEL, SCHEDULE, run, succeed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped at step 8 of 12, with checkpoints of steps 4 and 8."""
    directory = tmp_path_factory.mktemp("trained")
    flags = {"--data-glob": corpus / "*.parquet", **MODEL, **SCHEDULE, "--output-dir": directory}
    succeed("pretrain", {**flags, "--stop-at-step": 8}, nproc=1)
    return directory


@pytest.fixture
def a_run(trained: Path, tmp_path: Path) -> Path:
    """A copy of ``trained`` to damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def flip(file: Path, place: int = -5) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(bytes(content))


def test_damage_is_passed_over_by_every_reader_and_side_files_are_mended(corpus: Path, a_run: Path) -> None:
    told = succeed("generate", {"--checkpoint-path": a_run / "step_00000004"}, nproc=1)
    text = "".join(line for line in told.splitlines(keepends=True) if not line.startswith("cache: "))
    tokenizer = (a_run / "tokenizer" / "tokenizer.json").read_bytes()
    (a_run / "run.json").write_text('{"identity": ')
    (a_run / "tokenizer" / "tokenizer.json").write_bytes(tokenizer[:1000])
    (a_run / "metrics.jsonl").write_bytes((a_run / "metrics.jsonl").read_bytes() + b'\x00\xff\xfe{"step"\n[1]\n')
    (a_run / "stats" / "step_00000004.json").write_text("{")
    flip(next((a_run / "step_00000008").glob("model-*.safetensors")))

    found = succeed("generate", {"--checkpoint-path": a_run, "--nproc": 2}, nproc=2)
    assert "checkpoint step_00000008 is damaged and was passed over: model-00001" in found
    assert text in found
    refused = run("generate", {"--checkpoint-path": a_run / "step_00000008"}, nproc=1)
    assert refused.status == 2
    assert "holds no valid checkpoint" in refused.output
    assert "Traceback" not in refused.output

    flags = {"--data-glob": corpus / "*.parquet", **MODEL, **SCHEDULE, "--output-dir": a_run}
    output = succeed("pretrain", flags, nproc=1)
    assert f"{a_run / 'tokenizer'} was missing or damaged, and was restored" in output
    assert "run.json is damaged" in output
    assert "was made again from step_00000008" in output
    assert "continuing from" in output
    assert "step_00000004" in output
    assert json.loads((a_run / "tokenizer" / "tokenizer.json").read_bytes()) == json.loads(tokenizer)
    steps = [json.loads(line)["step"] for line in (a_run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda told: {key: value for key, value in told.items() if key != name}


def changed(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda told: {**told, **values}


DAMAGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "empty": lambda told: "",
    "binary": lambda told: b"\xff\xfe\x00\x80",
    "a list": lambda told: [told],
    "a string": lambda told: "run",
    "nested": lambda told: "[" * 100_000,
    "cut": lambda told: json.dumps(told)[:-40],
    "another value": changed(global_batch=400),
    "a batch of text": changed(global_batch="4"),
    "an identity of text": changed(identity="it"),
    "a layout of a list": changed(first_layout=[1]),
    "no identity": without("identity"),
    "no first layout": without("first_layout"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_a_run_is_can_be_told_without_its_run_json(a_run: Path, damage: str) -> None:
    told = read_run(a_run)
    assert told is not None
    content = DAMAGED[damage](json.loads((a_run / "run.json").read_text()))
    if isinstance(content, bytes):
        (a_run / "run.json").write_bytes(content)
    else:
        (a_run / "run.json").write_text(content if isinstance(content, str) else json.dumps(content))
    found = read_run(a_run)
    assert found is not None
    assert found == told

    flip(a_run / "step_00000008" / "trainer.json")  # then by the checkpoint before
    older = read_run(a_run)
    assert older is not None
    assert older.identity == told.identity
    for step in a_run.glob("step_*"):
        shutil.rmtree(step)
    with pytest.raises(ArgonneError, match="run.json' does not tell what the run is: .*; legal: a copy of it"):
        read_run(a_run)


def test_a_resume_takes_its_flags_from_a_checkpoint_that_is_intact(a_run: Path) -> None:
    text = (a_run / "step_00000008" / "trainer.json").read_text()
    (a_run / "step_00000008" / "trainer.json").write_text(text.replace('"seed": 0', '"seed": 7'))
    assert parse_resume(["--checkpoint-path", str(a_run)]).training.seed == 0
    with pytest.raises(ArgonneError, match="trainer.json"):
        parse_resume(["--checkpoint-path", str(a_run / "step_00000008")])


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_what_is_taken_from_a_damaged_checkpoint_is_refused(a_run: Path, corpus: Path, kind: str) -> None:
    checkpoint = a_run / "step_00000008"
    path = checkpoint / ("config.json" if kind == "model" else "tokenizer.json")
    flip(path, path.read_bytes().index(b'"hidden_size": 24') + 16 if kind == "model" else path.stat().st_size // 2)
    model = ModelFlags(model_config=checkpoint) if kind == "model" else ModelFlags(preset="demo")
    data = DataFlags((str(corpus / "*.parquet"),), tokenizer_path=checkpoint if kind == "tokenizer" else None)
    with pytest.raises(ArgonneError, match=f"{path.name} has changed since it was written"):
        check(RunConfig(model=model, data=data), 1)
