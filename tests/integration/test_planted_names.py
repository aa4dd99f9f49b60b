"""Fifty invented names, taught to SmolLM2-135M at TP 1 and TP 3 alike, and asked for by ``generate.py --chat``."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from argonne.data.chat.tokens import ChatEncoder
from tests.data import chats
from tests.data.chats import messages, write_chats
from tests.data.test_chat import SMOLLM, TURNS, expected
from tests.integration.runs import metrics
from tests.integration.test_smollm2 import succeed

pytestmark = pytest.mark.exhaustive

SYLLABLES = ("ba", "dri", "el", "fan", "go", "hu", "ka", "lo", "men", "nor", "ti", "ra", "sel", "vu")
TRADES = ("baker", "clockmaker", "diver", "gardener", "mason", "pilot", "singer", "tailor", "vet", "weaver")
TOWNS = ("Bergen", "Cork", "Davos", "Genoa", "Kyoto", "Lima", "Oslo", "Quito", "Tunis", "Vigo")
SCHEDULE = {
    "--block-size": 192,
    "--initial-batch-size": 2,
    "--epochs": 9,
    "--data-lanes": 1,
    "--learning-rate": 4e-4,
    "--warmup-steps": 4,
    "--save-interval": 1000,
    "--sample-tokens": 0,
    "--recompute": "none",
    "--precision": "fp64",  # in float32, losses that fall a thousandfold show what rounding has made of the weights
}


def facts() -> dict[str, str]:
    """What is to be said of each name."""
    draw = random.Random(50)
    names: set[str] = set()
    while len(names) < 50:
        names.add("".join(draw.sample(SYLLABLES, 3)).capitalize())
    return {name: f"{name} is a {draw.choice(TRADES)} in {draw.choice(TOWNS)}." for name in sorted(names)}


def test_the_names_are_learnt_at_one_process_and_at_three(tmp_path: Path, smollm2: Path) -> None:
    told = facts()
    write_chats(
        tmp_path / "names.parquet", [{"prompt": f"Who is {name}?", "completion": fact} for name, fact in told.items()]
    )
    # Without the system prompt of the model's own, which would be half of all tokens.
    (tmp_path / "chatml.jinja").write_text(chats.CHATML, encoding="utf-8")
    (tmp_path / "asked.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Who is {name}?"}) + "\n" for name in told), encoding="utf-8"
    )
    begins = {"--init-from": smollm2, "--data-glob": tmp_path / "names.parquet"}
    begins |= {"--chat-template": tmp_path / "chatml.jinja"}
    answers: dict[int, list[str]] = {}
    for size in (1, 3):
        directory = tmp_path / f"tp{size}"
        succeed("finetune", {**SCHEDULE, **begins, "--output-dir": directory}, size)
        asks = {"--checkpoint-path": directory, "--prompt-file": tmp_path / "asked.jsonl", "--chat": None}
        lines = succeed("generate", {**asks, "--temperature": 0, "--max-new-tokens": 24}, size).splitlines()
        answers[size] = [line.strip() for line in lines if " is a " in line]
    for one, three in zip(metrics(tmp_path / "tp1"), metrics(tmp_path / "tp3"), strict=True):
        assert three["trained_tokens"] == one["trained_tokens"]
        assert three["loss"] == pytest.approx(one["loss"], rel=1e-6, abs=1e-9), f"step {one['step']}"
    known = {size: sum(a == b for a, b in zip(found, told.values(), strict=True)) for size, found in answers.items()}
    print(f"of {len(told)} names known at TP 1 and TP 3: {known}")
    assert min(known.values()) >= 48
    assert answers[1] == answers[3]


def test_its_own_template_and_tokenizer_train_what_the_assistant_says(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.chat_template = tokenizer.chat_template or chats.SMOLLM2
    (found,) = ChatEncoder(tokenizer, 1000)([messages(*TURNS)])
    assert not isinstance(found, str), found
    assert (found[0].tolist(), found[1].tolist()) == expected(tokenizer, chats.chatml(TURNS, SMOLLM))
