from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import argonne
from argonne.data import (
    DataError,
    Encoder,
    boundary_tokens,
    encode,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)
from argonne.data.tokens.encoder import batch_rows
from argonne.data.tokens.tokenizer import SPECIAL_TOKENS

TRAIN = """
import sys
from argonne.data import train_tokenizer
texts = [f"w{i % 97} x{i % 89} yy{i % 31} " * 5 for i in range(2000)]
train_tokenizer(texts, vocab_size=600).save_pretrained(sys.argv[1])
"""


def words(*vocabulary: str, **special: object) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that knows `<unk>` and the given words."""
    ids = {word: index for index, word in enumerate(("<unk>", *vocabulary))}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"unk_token": "<unk>", **special})


def test_a_trained_tokenizer_has_its_special_tokens_at_ids_0_to_4(tokenizer) -> None:
    assert tokenizer.convert_ids_to_tokens(list(range(5))) == [
        "<|start_of_text|>",
        "<pad>",
        "<|end_of_text|>",
        "<unk>",
        "<mask>",
    ]
    assert {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS} == SPECIAL_TOKENS
    assert len(tokenizer) <= 400


def test_a_trained_tokenizer_gives_any_text_back_unchanged(tokenizer) -> None:
    text = " Leading space, \u00e9\u00e8, \u4e2d\u6587, \U0001f600,\ttab\nand  two spaces "
    (ids,) = encode(tokenizer, [text])
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_training_ignores_pairs_seen_once() -> None:
    assert len(train_tokenizer(["abcdefgh"])) == len(train_tokenizer([""])) == 5 + 256
    assert len(train_tokenizer(["ab ab"])) > 5 + 256


def test_training_gives_the_same_bytes_whatever_the_threads_and_hash_seed(tmp_path: Path) -> None:
    root = Path(argonne.__file__).parents[1]
    folders = {name: tmp_path / name for name in ("1", "4")}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(folder)],
            env={**os.environ, "PYTHONPATH": str(root), "RAYON_NUM_THREADS": name, "PYTHONHASHSEED": name},
        )
        for name, folder in folders.items()
    ]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    one, four = ((folder / "tokenizer.json").read_bytes() for folder in folders.values())
    assert one == four


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(DataError, match="vocab_size=260 is too small.*at least 261"):
        train_tokenizer(["text"], vocab_size=260)


def test_a_saved_tokenizer_loads_and_is_the_same(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert boundary_tokens(loaded) == boundary_tokens(tokenizer) == (0, 2)


def test_the_pad_token_falls_back_to_eos(tmp_path: Path) -> None:
    words("</s>", eos_token="</s>").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "</s>"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "is not a directory"),
        ({}, "holds no tokenizer"),
        ({"config.json": {"model_type": "gpt2"}}, "holds no tokenizer"),
        ({"tokenizer.json": "broken"}, "cannot be loaded"),
        (
            {
                "tokenizer_config.json": {"tokenizer_class": "CTRLTokenizer"},
                "vocab.json": {"<unk>": 0, "a</w>": 1},
                "merges.txt": "#version: 0.2\n",
            },
            "has no fast implementation",
        ),
    ],
    ids=["missing", "empty", "configuration_only", "broken", "slow"],
)
def test_a_path_without_a_usable_tokenizer_is_refused_in_one_line(files, message, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer"
    if files is not None:
        path.mkdir()
        for name, content in files.items():
            (path / name).write_text(json.dumps(content) if name.endswith(".json") else content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (words("A", "B", "<s>", "</s>", bos_token="A", eos_token="B"), ("A", "B")),
        (words("<s>", "</s>", "<|im_start|>", "<|im_end|>"), ("<|im_start|>", "<|im_end|>")),
        (words("[CLS]", "[SEP]", "<s>", "</s>"), ("<s>", "</s>")),
        (words("[CLS]", "[SEP]"), ("[CLS]", "[SEP]")),
        (words("B", "<|im_start|>", eos_token="B"), ("<|im_start|>", "B")),
        (words(extra_special_tokens=["<|doc|>"]), ("<|doc|>", "<|doc|>")),
        (words(bos_token="<unk>", eos_token="<unk>"), ("<unk>", "<unk>")),
    ],
    ids=["own", "chat", "sentence", "bert", "mixed", "additional", "gpt2"],
)
def test_boundary_tokens_are_the_first_that_exist(tokenizer, expected: tuple[str, str]) -> None:
    bos, eos = boundary_tokens(tokenizer)
    assert (tokenizer.convert_ids_to_tokens(bos), tokenizer.convert_ids_to_tokens(eos)) == expected


@pytest.mark.parametrize(
    ("tokenizer", "missing"),
    [
        (words("a"), "no BOS and no EOS token"),
        (words("</s>"), "no BOS token"),
        (words("<s>"), "no EOS token"),
        (words("a", extra_special_tokens=["<unk>"]), "no BOS and no EOS token"),
    ],
)
def test_a_missing_boundary_token_is_named_and_never_the_unknown_token(tokenizer, missing: str) -> None:
    with pytest.raises(DataError, match=f"the tokenizer has {missing}$"):
        boundary_tokens(tokenizer)


def test_the_fingerprint_ignores_padding_and_truncation_but_not_the_vocabulary(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    other = load_tokenizer(tmp_path)
    other(["some text"], padding="max_length", truncation=True, max_length=8)
    assert other.backend_tokenizer.padding is not None
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)
    assert other.backend_tokenizer.padding is not None
    other.add_tokens(["newword"])
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


def test_special_tokens_written_in_a_document_are_ordinary_text(tokenizer, tmp_path: Path) -> None:
    before = tokenizer.backend_tokenizer.to_str()
    text = "before<|end_of_text|>after <pad> <|start_of_text|>"
    (ids,) = encode(tokenizer, [text])
    assert not set(ids.tolist()) & set(range(5))
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.encode("<|end_of_text|>", add_special_tokens=False) == [2]
    assert tokenizer.backend_tokenizer.to_str() == before


def test_encoding_ignores_truncation_and_padding_left_on_the_tokenizer(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    other = load_tokenizer(tmp_path)
    other(["some text"], padding="max_length", truncation=True, max_length=4)
    texts = ["baba condri elfan goist", "ba"]
    assert [ids.tolist() for ids in encode(other, texts)] == [ids.tolist() for ids in encode(tokenizer, texts)]


def test_a_document_that_cannot_be_tokenised_fails_alone(tokenizer) -> None:
    good, bad, last = encode(tokenizer, ["baba condri", "\ud800", "elfan"])
    assert bad is None
    assert [good.tolist(), last.tolist()] == [x.tolist() for x in encode(tokenizer, ["baba condri", "elfan"])]


def test_a_document_longer_than_the_models_context_gives_no_warning(tokenizer, tmp_path, caplog) -> None:
    tokenizer.save_pretrained(tmp_path)
    other = load_tokenizer(tmp_path)
    other.model_max_length = 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (ids,) = encode(other, ["baba condri " * 50])
    assert len(ids) > 8
    assert not caplog.records


@pytest.mark.parametrize(("value", "rows"), [(None, 64), ("16", 16), ("512", 512)])
def test_the_tokeniser_batch_is_taken_from_the_environment(value, rows, monkeypatch) -> None:
    if value is None:
        monkeypatch.delenv("RESUME_TOKENIZER_BATCH_ROWS", raising=False)
    else:
        monkeypatch.setenv("RESUME_TOKENIZER_BATCH_ROWS", value)
    assert batch_rows() == rows


@pytest.mark.parametrize("value", ["15", "many", "-64", "2.5", ""])
def test_a_bad_batch_setting_is_reported_once_and_ignored(value: str, monkeypatch) -> None:
    monkeypatch.setenv("RESUME_TOKENIZER_BATCH_ROWS", value)
    with pytest.warns(UserWarning, match=f"BATCH_ROWS={value} is ignored.*at least 16"):
        assert batch_rows() == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert batch_rows() == 64


def test_workers_set_the_thread_pool_unless_it_is_set_already(tokenizer, monkeypatch) -> None:
    monkeypatch.setenv("RESUME_TOKENIZER_WORKERS", "3")
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    Encoder(tokenizer)
    assert os.environ["RAYON_NUM_THREADS"] == "1"
    monkeypatch.delenv("RAYON_NUM_THREADS")
    Encoder(tokenizer)
    assert os.environ["RAYON_NUM_THREADS"] == "3"
    monkeypatch.setenv("RESUME_TOKENIZER_WORKERS", "0")
    with pytest.warns(UserWarning, match="WORKERS=0 is ignored.*at least 1"):
        Encoder(tokenizer)
