"""A real model, opened at several layouts, has the logits, the loss and the texts of ``transformers``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from argonne.checkpoint import load_pieces, weight_pieces
from argonne.inference import Sampling, continue_all
from argonne.inference.opening import model_at
from argonne.models import Batch, CrossEntropyLoss, Execution, build_model, from_huggingface
from argonne.parallel import Layout, Precision, ProcessGroups
from tests.pool import RankPool
from tests.whole import assert_close

pytestmark = pytest.mark.exhaustive

TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "We hold these truths to be self-evident, that all men are created equal, that they are endowed by their Creator "
    "with certain unalienable Rights, that among these are Life, Liberty and the pursuit of",
]
PROMPTS = [
    *("The capital of France is", "Water boils at", "Once upon a time there was", "The largest planet is", "2 + 2 ="),
    *("def add(a, b):", "My favourite colour is", "In 1969, people", "The opposite of hot is", "Dear Sir or Madam,"),
    *("A triangle has", "The speed of light", "To bake bread you need", "SELECT name FROM", "Photosynthesis is"),
    *(
        "The first president of the United States",
        "Good morning! How",
        "Roses are red,",
        "If it rains",
        "Über den Wolken",
    ),
]
"""Of unequal lengths: they are written in batches."""
LAYOUTS = [
    Layout(),
    Layout(tensor=3),
    Layout(tensor=3, sequence_parallel=True),
    Layout(pipeline=2),
    Layout(tensor=3, pipeline=2),
]


def told(groups: ProcessGroups, smollm2: Path, texts: list[Tensor]) -> tuple[list[Tensor], float]:
    """The last logits of each text, and the summed loss of the longest."""
    model = build_model(from_huggingface(smollm2), Execution(groups))
    load_pieces(smollm2, weight_pieces(model.sharded_parameters()))
    ids = texts[-1]
    whole = len(ids[0]) - 1 - (len(ids[0]) - 1) % 3  # sequence parallelism shares the tokens out over 3
    batch = Batch(ids[:, :whole], ids[:, 1 : whole + 1])
    return [model.next_token_logits(text) for text in texts], model.evaluate(batch, CrossEntropyLoss()).item()


def written(groups: ProcessGroups, smollm2: Path, prompts: list[list[int]], end: int) -> list[list[int]]:
    model = model_at(smollm2, groups, Precision(torch.float32, torch.float32), generating=True)
    return continue_all(model, prompts, Sampling(max_new_tokens=64, temperature=0.0), 0, end, batch=10)


def test_twenty_prompts_are_continued_as_transformers_does_at_every_layout(ranks: RankPool, smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    with torch.no_grad():
        expected = [
            model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids) :].tolist()
            for ids in prompts
        ]
    end = tokenizer.eos_token_id
    expected = [text[:-1] if text[-1] == end else text for text in expected]
    assert sum(len(text) == 64 for text in expected) > 10, "most end too early to say much"
    del model
    for layout in LAYOUTS:
        for rank, found in enumerate(ranks.run(layout, written, smollm2, prompts, end)):
            for text, ours, theirs in zip(PROMPTS, found, expected, strict=True):
                assert ours == theirs, f"{layout}, rank {rank}: {text}"


def test_logits_and_loss_are_those_of_transformers_at_every_layout(ranks: RankPool, smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    texts = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
    with torch.no_grad():
        logits = [model(text).logits for text in texts]
    whole = len(texts[-1][0]) - 1 - (len(texts[-1][0]) - 1) % 3
    loss = torch.nn.functional.cross_entropy(logits[-1][0, :whole], texts[-1][0, 1 : whole + 1], reduction="sum").item()
    del model
    for layout in LAYOUTS:
        for rank, (last, found) in enumerate(ranks.run(layout, told, smollm2, texts)):
            for number, (ours, theirs) in enumerate(zip(last, logits, strict=True)):
                assert_close(ours, theirs[:, -1], 1e-4, f"{layout}, rank {rank}: logits of text {number}")
            assert found == pytest.approx(loss, rel=1e-5), f"{layout}, rank {rank}"
