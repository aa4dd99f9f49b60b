"""A GGUF opens in transformers with the same logits and ids, and says what llama.cpp must know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from argonne.convert import ConvertFlags, convert
from argonne.convert.gguf_tokenizer import gguf_tokenizer
from argonne.data import boundary_tokens, train_tokenizer
from argonne.models import ArgonneConfig
from argonne.parallel import ArgonneError
from tests.export import export
from tests.qwen import PATTERN
from tests.whole import assert_close

gguf = pytest.importorskip("gguf")

TEXTS = (
    "Some words, and a few more of them; we've 12345 others.",
    "  spaces   before and\tafter \n\n lines\r\n",
    "Zażółć gęślą jaźń, 東京都, привет, مرحبا, 🙂👩‍👩‍👧 and e\u0301",
    "<|end_of_text|>special<mask> tokens",
    "def f(x):\n    return x**2  # don't\n",
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([*TEXTS, "some words of a text, and a few more "] * 9, 400)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_opens_it_with_the_same_logits_and_ids(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, tied: bool
) -> None:
    config = ArgonneConfig(
        24, 2, 6, 3, len(tokenizer) + 5, 40, rope_theta=500.0, max_position_embeddings=32, tie_word_embeddings=tied
    )
    directory = export(tmp_path, config, tokenizer, boundary_tokens(tokenizer))
    convert(directory, tmp_path / "model.gguf", ConvertFlags(to="gguf"))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    plain = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.randint(0, len(tokenizer), (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(opened(ids).logits.double(), plain(ids).logits.double(), 1e-5, "logits")
    words = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS:
        assert words.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False), text


def read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a file says, and its tensors in float32."""
    reader = gguf.GGUFReader(file)
    values = {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in reader.tensors}
    return (
        {name: field.contents() for name, field in reader.fields.items()},
        {name: torch.from_numpy(value.astype("float32").copy()) for name, value in values.items()},
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_it_says_what_llama_cpp_must_know(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, dtype: Any) -> None:
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    rows = len(names) + 2
    config = ArgonneConfig(
        24, 2, 4, 2, rows, 40, head_dim=10, rope_theta=500.0, rms_norm_eps=3e-6, max_position_embeddings=32
    )
    directory = export(tmp_path, config, tokenizer, boundary_tokens(tokenizer))
    convert(directory, tmp_path / "small.gguf", ConvertFlags(to="gguf", dtype=dtype))
    told, tensors = read(tmp_path / "small.gguf")
    expected = {
        "general.architecture": "llama",
        "general.name": "small",
        "general.file_type": {"float32": 0, "float16": 1, "bfloat16": 32}[dtype],
        "llama.vocab_size": rows,
        "llama.block_count": 2,
        "llama.context_length": 32,
        "llama.embedding_length": 24,
        "llama.feed_forward_length": 40,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 10,
        "llama.attention.value_length": 10,
        "llama.rope.dimension_count": 10,
        "llama.rope.freq_base": 500.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.token_type": [3] * 5 + [1] * (rows - 7) + [5] * 2,
        "tokenizer.ggml.tokens": [*names, f"[PAD{rows - 2}]", f"[PAD{rows - 1}]"],
    }
    assert {name: told[name] for name in expected} == expected
    assert told["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(3e-6)
    weights = {
        n: t.to(getattr(torch, dtype)).float()
        for n, t in load_file(directory / "model-00001-of-00001.safetensors").items()
    }
    assert len(tensors) == len(weights)  # a tied head is left out: llama.cpp takes the embedding
    assert torch.equal(tensors["token_embd.weight"], weights["model.embed_tokens.weight"])
    assert torch.equal(tensors["blk.1.ffn_down.weight"], weights["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(tensors["blk.1.attn_v.weight"], weights["model.layers.1.self_attn.v_proj.weight"])
    key, ours = tensors["blk.1.attn_k.weight"], weights["model.layers.1.self_attn.k_proj.weight"]
    order = [10 * head + half * 5 + pair for head in range(2) for pair in range(5) for half in range(2)]
    assert torch.equal(key, ours[order])


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)


def trained(*steps: Any, **model: Any) -> PreTrainedTokenizerFast:
    """A small byte-level BPE that cuts text by other rules."""
    plain = train_tokenizer([*TEXTS] * 9, 300).backend_tokenizer
    state = json.loads(plain.to_str())
    state["model"] |= model
    backend = Tokenizer.from_str(json.dumps(state))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end_of_text|>")


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
NAMES = {
    "gpt-2": lambda: trained(split(GPT2), BYTES),
    "smollm": lambda: trained(pre_tokenizers.Digits(individual_digits=True), WORDS),
    "qwen2": lambda: trained(split(PATTERN), BYTES),
    "llama-bpe": lambda: trained(split(LLAMA3), BYTES, ignore_merges=True),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_rules_by_which_text_is_cut_are_named(name: str) -> None:
    assert gguf_tokenizer(NAMES[name](), 300).pre == name


def normalised() -> PreTrainedTokenizerFast:
    tokenizer = trained(WORDS)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def with_bos() -> PreTrainedTokenizerFast:
    tokenizer = trained(WORDS)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<mask> $A", special_tokens=[("<mask>", 4)]
    )
    return tokenizer


def unigram() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: trained(split(r"\w+"), BYTES), "cuts text by rules that llama.cpp has no name for"),
        (lambda: trained(split(LLAMA3), BYTES), "cuts text by rules"),  # the rules of a name, and merges of another
        (lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)), "cuts text by rules"),
        (lambda: trained(pre_tokenizers.Metaspace()), "cuts text by rules"),
        (normalised, "changes text before it cuts it (Lowercase)"),
        (unigram, "the tokenizer is Unigram"),
        (lambda: trained(WORDS, byte_fallback=True), "has byte_fallback=True, which llama.cpp has not"),
        (lambda: trained(WORDS, unk_token="<unk>"), "has unk_token='<unk>', which llama.cpp has not"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(made: Any, message: str) -> None:
    with pytest.raises(ArgonneError) as error:
        gguf_tokenizer(made(), 300)
    assert message in str(error.value)
    assert "legal: byte-level BPE" in str(error.value)


def test_what_a_tokenizer_adds_by_itself_is_said() -> None:
    assert gguf_tokenizer(with_bos(), 300).adds == {"bos": True, "eos": False}
    with pytest.raises(ArgonneError, match="has 300 tokens and the model rows for 299"):
        gguf_tokenizer(with_bos(), 299)
