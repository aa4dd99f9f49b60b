"""Perplexity is that of ``transformers`` at every layout; each token is scored once, with the context asked for."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from argonne.data import load_tokenizer, train_tokenizer
from argonne.data.corpus.documents import read_documents
from argonne.inference.opening import open_model
from argonne.inference.perplexity import NO_TARGET, Perplexity, Scoring, perplexity, windows
from argonne.parallel import ArgonneError, Layout, ProcessGroups
from argonne.parallel.tensor_parallel.precision import PRECISIONS
from tests.pool import RankPool

TEXTS = [
    "We the people of the United States, in order to form a more perfect union",
    "",
    None,
    "Vier Wörter, ≈ 20 Zeichen — ☃",
    "a",
    "a long document " * 9 + "that ends here",
]
LONGEST = 48
LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(pipeline=2),
    Layout(tensor=2, sequence_parallel=True),
    Layout(tensor=2, context=2, sequence_parallel=True),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("perplexity")
    tokenizer = train_tokenizer([text for text in TEXTS if text] * 2, 300)
    tokenizer.save_pretrained(path)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONGEST,
        initializer_range=0.4,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def score(groups: ProcessGroups, directory: Path, precision: str, scoring: Scoring) -> Perplexity:
    opened = open_model(directory, groups, PRECISIONS[precision])
    return perplexity(opened.model, opened.tokenizer, TEXTS, scoring)


@contextmanager
def in_double(model: LlamaForCausalLM) -> Iterator[None]:
    """Have ``transformers`` compute in float64 what it computes in float32 whatever the model's dtype is."""
    dim, rope = model.config.head_dim, model.config.rope_parameters["rope_theta"]
    model.model.rotary_emb.inv_freq = rope ** -(torch.arange(0, dim, 2).double() / dim)
    with ExitStack() as patched:
        for name in ("float", "float32"):
            patched.enter_context(mock.patch.object(torch, name, torch.float64))
        patched.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        yield


@functools.cache
def reference(directory: Path, dtype: torch.dtype, scoring: Scoring) -> tuple[float, int]:
    """Each token by itself, behind what its window shows before it."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype)
    tokenizer, total, count = load_tokenizer(directory), 0.0, 0
    for text in TEXTS:
        ids = torch.tensor(tokenizer(text or "").input_ids, dtype=torch.int64)
        for target in range(1, len(ids)):
            window = max(0, math.ceil((target - scoring.window) / scoring.stride))
            with torch.no_grad(), in_double(model) if dtype == torch.float64 else nullcontext():
                logits = model(ids[None, window * scoring.stride : target]).logits[0, -1]
            total -= logits.double().log_softmax(0)[ids[target]].item()
            count += 1
    return total, count


@pytest.mark.parametrize("layout", LAYOUTS, ids=str, scope="module")
@pytest.mark.parametrize(
    ("precision", "scoring", "bound"),
    [
        ("fp32", Scoring(LONGEST, LONGEST, 2), 1e-6),
        ("fp64", Scoring(LONGEST, LONGEST, 2), 1e-10),
        ("fp64", Scoring(11, 3, 4), 1e-10),
    ],
)
def test_the_loss_is_that_of_transformers_at_every_layout(
    ranks: RankPool, directory: Path, layout: Layout, precision: str, scoring: Scoring, bound: float
) -> None:
    dtype = torch.float64 if precision == "fp64" else torch.float32
    expected, count = reference(directory, dtype, scoring)
    for found in ranks.run(layout, score, directory, precision, scoring):
        assert found.nats == pytest.approx(expected, rel=bound)
        assert (found.documents, found.skipped, found.tokens) == (3, 3, count)
        assert found.perplexity == pytest.approx(math.exp(expected / count), rel=10 * bound)


def test_short_documents_have_the_loss_that_transformers_tells(directory: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float64)
    ids = torch.tensor([load_tokenizer(directory)(TEXTS[3]).input_ids])
    opened = open_model(directory, ProcessGroups.single(), PRECISIONS["fp64"])
    found = perplexity(opened.model, opened.tokenizer, [TEXTS[3]], Scoring(LONGEST, LONGEST))
    with torch.no_grad(), in_double(model):
        assert found.loss == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-10)
    # All characters but the first token's, which nothing comes before.
    text = str(TEXTS[3])
    first = opened.tokenizer.decode(ids[0, :1])
    assert text.startswith(first)
    assert found.bytes == len(text.removeprefix(first).encode())
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / found.bytes)


@given(st.integers(0, 40), st.integers(1, 12), st.data())
def test_each_token_is_scored_once_with_the_context_that_the_stride_gives(
    length: int, size: int, data: st.DataObject
) -> None:
    stride, ids = data.draw(st.integers(1, size)), list(range(length))
    scored = []
    for number, (shown, targets) in enumerate(windows(ids, size, stride)):
        assert len(shown) == len(targets) <= size
        for place, target in enumerate(targets):
            if target != NO_TARGET:
                assert target == shown[place] + 1
                assert place + 1 >= (1 if number == 0 else min(size - stride + 1, size))
                scored.append(target)
    assert scored == ids[1:]


def test_documents_are_rows_of_shards_and_whole_text_files(tmp_path: Path) -> None:
    pq.write_table(pa.table({"words": ["one", None, "three"]}), tmp_path / "rows.parquet")
    (tmp_path / "plain.md").write_bytes("zwei\r\nZeilen ☃\n".encode())
    words = (str(tmp_path / "plain.md"), str(tmp_path / "*.parquet"))
    assert list(read_documents(words, "words")) == ["zwei\r\nZeilen ☃\n", "one", None, "three"]


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no UTF-8": (lambda path: path.write_bytes(b"good \xff"), r"is no text in UTF-8 \(byte 5 cannot be\)"),
    "no file": (lambda path: None, "no data shards match"),
    "no text": (lambda path: path.write_text(""), "there is nothing to score"),
    "may not be read": (lambda path: os.symlink("/proc/self/mem", path), "cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scored_is_refused_in_one_line(directory: Path, tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    make(tmp_path / "text.txt")
    opened = open_model(directory, ProcessGroups.single(), PRECISIONS["fp32"])
    documents = read_documents([str(tmp_path / "text.txt")])
    with pytest.raises(ArgonneError, match=message) as refusal:
        perplexity(opened.model, opened.tokenizer, documents, Scoring(LONGEST, LONGEST))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        (Scoring(49, 49), "window=49 is not legal; legal: 1 to 48"),
        (Scoring(0, 1), "window=0 is not legal; legal: 1 or more"),
        (Scoring(20, 21), "stride=21 is not legal; legal: 1 to 20"),
        (Scoring(20, 0), "stride=0 is not legal; legal: 1 or more"),
        (Scoring(20, 20, 0), "batch_size=0 is not legal; legal: 1 or more"),
    ],
)
def test_windows_that_cannot_be_are_refused(directory: Path, scoring: Scoring, message: str) -> None:
    with pytest.raises(ArgonneError, match=message):
        scoring.check(LONGEST)


def test_weights_that_have_diverged_and_ids_that_the_model_has_not_are_refused(directory: Path) -> None:
    opened = open_model(directory, ProcessGroups.single(), PRECISIONS["fp32"])
    assert isinstance(opened.model, torch.nn.Module)
    opened.tokenizer.add_tokens(["perfect"])
    with pytest.raises(ArgonneError, match=r"the tokenizer gives id \d+, which the model of vocab_size=\d+ has not"):
        perplexity(opened.model, opened.tokenizer, TEXTS, Scoring(9, 9))
    with torch.no_grad():
        next(opened.model.parameters()).fill_(math.inf)
    with pytest.raises(ArgonneError, match="not finite"):
        perplexity(opened.model, load_tokenizer(directory), TEXTS, Scoring(9, 9))
