"""Argonne 1.5 at a reduced size, from text to text, through the drivers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from argonne.training.evaluation import PROMPT
from tests.integration.runs import ROOT, SCHEDULE, finish, history, metrics, run_until_killed, start, succeed, weights

pytestmark = pytest.mark.exhaustive

SMALL = {
    "--preset": "argonne-1.5",
    "--hidden-size": 32,
    "--num-hidden-layers": 4,
    "--num-attention-heads": 4,
    "--max-position-embeddings": 48,
}


def convert(*words: str) -> None:
    done = finish(start([sys.executable, str(ROOT / "examples" / "convert.py"), *words]))
    assert done.status == 0, done.output


def text_of(flags: dict[str, Any], nproc: int) -> str:
    """What ``generate.py`` writes, without what it says of its cache."""
    lines = succeed("generate", flags, nproc=nproc).splitlines()
    return "\n".join(line for line in lines if not line.startswith("cache: ")).strip()


@pytest.fixture(scope="module")
def asked(corpus: Path, flags: dict[str, Any]) -> dict[str, Any]:
    return {"--data-glob": corpus / "*.parquet", "--tokenizer-path": flags["--tokenizer-path"], **SMALL, **SCHEDULE}


@pytest.fixture(scope="module")
def undisturbed(asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("argonne1")
    succeed("pretrain", {**asked, "--output-dir": directory})
    return directory


def test_a_run_that_is_killed_and_resumed_is_the_undisturbed_one_and_writes_text(
    asked: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_until_killed("pretrain", {**asked, "--output-dir": run}, steps=6)
    succeed("resume", {"--checkpoint-path": run})
    assert history(run) == history(undisturbed)
    assert weights(run) == weights(undisturbed)

    greedy = {"--checkpoint-path": run, "--prompt": PROMPT, "--max-new-tokens": 12, "--temperature": 0}
    texts = {text_of(greedy, nproc=nproc) for nproc in (1, 2)}
    newest = sorted(run.glob("step_*"))[-1]
    tokenizer, model = AutoTokenizer.from_pretrained(newest), GPT2LMHeadModel.from_pretrained(newest)
    ids = torch.tensor([tokenizer.encode(PROMPT, add_special_tokens=False)])
    theirs = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert texts == {tokenizer.decode(theirs[0], skip_special_tokens=True).strip()}

    old, again = tmp_path / "old.pth", tmp_path / "again"
    convert(str(run), str(old), "--to", "argonne1")
    convert(str(old), str(again), "--tokenizer-path", str(newest))
    state, back = (GPT2LMHeadModel.from_pretrained(path).state_dict() for path in (newest, again))
    assert state.keys() == back.keys()
    assert [name for name, value in state.items() if not torch.equal(value, back[name])] == []
    assert text_of({**greedy, "--checkpoint-path": again}, nproc=2) in texts


@pytest.mark.parametrize(
    ("nproc", "layout"),
    [
        (1, {"--disable-gradient-checkpointing": None}),
        (2, {"--sequence-parallel": None}),
        (2, {"--pipeline-parallel": 2, "--pipeline-schedule": "zb"}),
        (2, {"--data-parallel": 2, "--fsdp": None, "--gradient-accumulation-steps": 1}),
        (4, {"--data-parallel": 2, "--zero1": None, "--sequence-parallel": None, "--gradient-accumulation-steps": 1}),
    ],
    ids=str,
)
def test_other_layouts_learn_the_same(
    asked: dict[str, Any], undisturbed: Path, tmp_path: Path, nproc: int, layout: dict[str, Any]
) -> None:
    succeed("pretrain", {**asked, **layout, "--output-dir": tmp_path}, nproc=nproc)
    losses, expected = ([line["loss"] for line in metrics(each)] for each in (tmp_path, undisturbed))
    assert losses == pytest.approx(expected, rel=1e-4)
