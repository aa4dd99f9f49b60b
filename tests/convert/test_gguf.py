"""A GGUF opens in transformers with the same logits and ids, and says what llama.cpp must know."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from argonne.convert import ConvertFlags, convert
from argonne.convert.gguf_tokenizer import gguf_tokenizer
from argonne.data import boundary_tokens, train_tokenizer, write_tokenizer
from argonne.models import ArgonneConfig, RopeScaling
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


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "llama": {"attention_bias": True, "output_bias": True},
    "mistral": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 128},  # what transformers takes for the width of any of its heads
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_llama_opens_with_the_same_logits(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    config = ArgonneConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        intermediate_size=40,
        family=family,
        max_position_embeddings=32,
        **FAMILIES[family],
    )
    directory = export(tmp_path, config, tokenizer, None)
    # Of a directory of its own: beside a Qwen's weights transformers makes Qwen's rules of any vocabulary.
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tokenizer, tmp_path / "tokenizer")
    convert(directory, tmp_path / "model.gguf", ConvertFlags(to="gguf", tokenizer_path=tmp_path / "tokenizer"))
    told, tensors = read(tmp_path / "model.gguf")
    assert told["general.architecture"] == {"mistral": "llama"}.get(family, family)
    assert len(tensors) == len(load_file(directory / "model-00001-of-00001.safetensors"))
    if family == "llama":  # transformers takes no biases from a Llama's file
        return
    ids = torch.randint(0, len(tokenizer), (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        opened = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(directory)(ids).logits
    assert_close(opened.double(), plain.double(), 1e-5, "logits")


def test_stretched_rotary_positions_are_told_as_llama_cpp_wants_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def made(name: str, **scaling: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        config = ArgonneConfig(
            **SIZES, head_dim=16, vocab_size=len(tokenizer), intermediate_size=40, rope_scaling=RopeScaling(**scaling)
        )
        directory = export(tmp_path / name, config, tokenizer, None)
        convert(directory, tmp_path / f"{name}.gguf", ConvertFlags(to="gguf"))
        return read(tmp_path / f"{name}.gguf")

    told, _ = made("linear", rope_type="linear", factor=4.0)
    assert (told["llama.rope.scaling.type"], told["llama.rope.scaling.factor"]) == ("linear", 4.0)
    told, _ = made("yarn", rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    assert told["llama.rope.scaling.type"] == "yarn"
    assert told["llama.rope.scaling.original_context_length"] == 64
    fields = {"original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    told, tensors = made("llama3", rope_type="llama3", factor=8.0, **fields)
    assert "llama.rope.scaling.type" not in told
    divisors = []  # from the paper's three cases
    for turned in (10_000.0 ** -(pair / 8) for pair in range(8)):
        length = 2 * math.pi / turned
        share = (64 / length - 1.0) / (4.0 - 1.0)
        divisors.append(1.0 if length < 64 / 4.0 else 8.0 if length > 64 / 1.0 else 1 / ((1 - share) / 8.0 + share))
    assert_close(tensors["rope_freqs.weight"].double(), torch.tensor(divisors, dtype=torch.float64), 1e-6, "divisors")
    with pytest.raises(ArgonneError, match="rope_scaling.beta_fast=16.0 of a llama cannot become GGUF"):
        made("other", rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=16.0)
