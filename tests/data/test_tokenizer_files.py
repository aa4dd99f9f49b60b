"""What is written of a tokenizer: understood by older clients, with what training decided, and the same ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from argonne.data import boundary_tokens, load_tokenizer, special_tokens, tokenizer_fingerprint, write_tokenizer
from argonne.data.tokens.byte_pair import AWKWARD
from tests.data.test_tokenizer import words
from tests.older_clients import require_accepted


def chat() -> PreTrainedTokenizerFast:
    """BOS and EOS under the usual names of chat models only, extra tokens, a template, another padding side."""
    tokenizer = words("a", "b", padding_side="left", extra_special_tokens=["<|extra|>"], model_max_length=7777)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|extra|>", "<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = "{{ messages[0].content }}"
    return tokenizer


def prefixed() -> PreTrainedTokenizerFast:
    """Byte-level, with a space put before every text."""
    alphabet = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE({**alphabet, "\u0120a": 256}, [("\u0120", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=True)


def bert() -> PreTrainedTokenizerFast:
    vocabulary = {token: place for place, token in enumerate(["[UNK]", "[CLS]", "[SEP]", "a", "##b", "c"])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


KINDS = {
    "chat": chat,
    "plain words as boundaries": lambda: words("<s>", "</s>", "a"),
    "own": lambda: words("A", "B", bos_token="A", eos_token="B"),
    "prefix": prefixed,
    "bert": bert,
}


@pytest.mark.parametrize("kind", KINDS)
def test_written_files_are_accepted_by_older_clients_and_give_the_same_ids(kind: str, tmp_path: Path) -> None:
    KINDS[kind]().save_pretrained(tmp_path / "original")
    tokenizer = load_tokenizer(tmp_path / "original")  # with what the library adds on loading
    before = tokenizer.backend_tokenizer.to_str()
    write_tokenizer(tokenizer, tmp_path / "written")
    require_accepted(tmp_path / "written")
    assert tokenizer.backend_tokenizer.to_str() == before
    opened = AutoTokenizer.from_pretrained(tmp_path / "written")
    assert type(opened) is PreTrainedTokenizerFast
    for text in AWKWARD:
        assert opened(text).input_ids == tokenizer(text).input_ids, text
    assert special_tokens(opened) == special_tokens(tokenizer)
    assert opened.extra_special_tokens == tokenizer.extra_special_tokens
    assert opened.chat_template == tokenizer.chat_template
    assert (opened.padding_side, opened.model_max_length) == (tokenizer.padding_side, tokenizer.model_max_length)
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "written")) == tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize("kind", ["chat", "plain words as boundaries", "own", "bert"])
def test_the_boundary_tokens_of_training_are_the_written_tokenizers_own(kind: str, tmp_path: Path) -> None:
    KINDS[kind]().save_pretrained(tmp_path / "original")
    tokenizer = load_tokenizer(tmp_path / "original")
    boundary, own = boundary_tokens(tokenizer), special_tokens(tokenizer)
    told = write_tokenizer(tokenizer, tmp_path / "written", boundary, max_length=32)
    assert (told["bos_token_id"], told["eos_token_id"]) == boundary
    assert told["pad_token_id"] == (tokenizer.pad_token_id if own["pad_token"] else boundary[1])
    assert special_tokens(tokenizer) == own
    opened = AutoTokenizer.from_pretrained(tmp_path / "written")
    assert told == {f"{name}_token_id": getattr(opened, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    assert opened.model_max_length == 32
    assert boundary_tokens(load_tokenizer(tmp_path / "written")) == boundary
    # As a run that goes on with its checkpoint's tokenizer has it: the same in every way.
    again = load_tokenizer(tmp_path / "written", special_tokens=own)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    assert (boundary_tokens(again), special_tokens(again)) == (boundary, own)


def test_the_space_before_a_text_is_told_to_clients_that_take_the_flags_word(tmp_path: Path) -> None:
    write_tokenizer(prefixed(), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is True
    assert config["clean_up_tokenization_spaces"] is False  # it does nothing to BPE here, and would there


def test_templates_by_name_are_kept(tmp_path: Path) -> None:
    tokenizer = words("a")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    write_tokenizer(tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


QWEN = {"tokenizer_class": "Qwen2Tokenizer"}


@pytest.mark.parametrize(
    ("config", "made_by"),
    [
        ({"tokenizer_config.json": QWEN}, "Qwen2Tokenizer"),
        ({"config.json": {"model_type": "qwen2"}}, "Qwen2Tokenizer"),
        ({"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "unk_token": None}}, "GPT2Tokenizer"),
    ],
    ids=["by its class", "by its model", "a space before the text"],
)
def test_a_class_that_makes_other_ids_than_tokenizer_json_is_refused(config, made_by: str, tmp_path: Path) -> None:
    prefixed().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name, content in config.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(Exception, match=f"{made_by}.*gives other ids than tokenizer.json for") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    load_tokenizer(tmp_path, compare=False)


def test_a_configuration_that_adds_ordinary_tokens_to_tokenizer_json_is_refused(tmp_path: Path) -> None:
    words("a").backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    added = {"7": AddedToken("<mask>", normalized=False).__getstate__()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="other ids than tokenizer.json"):
        load_tokenizer(tmp_path)


def test_special_tokens_that_only_the_configuration_names_are_no_difference(tmp_path: Path) -> None:
    words("a", "</s>").backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).eos_token == "</s>"
