"""Our config.json is Llama's: transformers reads it to the same values, and we read what it writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from argonne.checkpoint import save_checkpoint, weight_pieces
from argonne.files import write_json
from argonne.models import ArgonneConfig, ArgonneModel, Execution, from_huggingface, to_huggingface
from argonne.models.config import PRESETS
from argonne.parallel import ArgonneError, ProcessGroups
from tests import dense
from tests.whole import assert_close

TOKENS: dict[str, int | None] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
PLAIN = {
    "model_type": "llama",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "vocab_size": 50,
    "intermediate_size": 40,
}


OURS = {"rope_theta", "rope_scaling", "family", "output_bias", "qk_norm"}
SHARED = [field.name for field in dataclasses.fields(ArgonneConfig) if field.name not in OURS]


@st.composite
def configs(draw: st.DrawFn) -> ArgonneConfig:
    kv = draw(st.integers(1, 4))
    heads = kv * draw(st.integers(1, 4))
    return ArgonneConfig(
        hidden_size=heads * draw(st.integers(1, 9)),  # transformers takes no other, whatever head_dim says
        num_hidden_layers=draw(st.integers(1, 5)),
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=draw(st.integers(8, 999)),
        intermediate_size=draw(st.none() | st.integers(1, 99)),
        head_dim=2 * draw(st.integers(1, 40)),
        max_position_embeddings=draw(st.integers(1, 9999)),
        rms_norm_eps=draw(st.floats(1e-9, 1e-2)),
        rope_theta=draw(st.floats(1.5, 1e7)),
        tie_word_embeddings=draw(st.booleans()),
        initializer_range=draw(st.floats(1e-4, 1.0)),
    )


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


REUSED_DIRECTORY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(configs())
@REUSED_DIRECTORY
def test_config_round_trips_through_its_file_or_directory(tmp_path: Path, config: ArgonneConfig) -> None:
    file = write(tmp_path / "config.json", to_huggingface(config, TOKENS, "float32"))
    assert from_huggingface(file) == config
    assert from_huggingface(tmp_path) == config


@given(configs())
@REUSED_DIRECTORY
def test_transformers_reads_the_same_values(tmp_path: Path, config: ArgonneConfig) -> None:
    write(tmp_path / "config.json", to_huggingface(config, TOKENS, "bfloat16"))
    llama = LlamaConfig.from_pretrained(tmp_path)
    for field in SHARED:
        assert getattr(llama, field) == getattr(config, field), field
    assert llama.rope_parameters["rope_theta"] == config.rope_theta
    assert llama.rope_parameters["rope_type"] == "default"
    assert llama.dtype == torch.bfloat16
    assert (llama.bos_token_id, llama.eos_token_id, llama.pad_token_id) == (1, 2, None)
    assert (llama.attention_bias, llama.mlp_bias, llama.hidden_act) == (False, False, "silu")
    assert llama.architectures == ["LlamaForCausalLM"]


@given(configs())
@REUSED_DIRECTORY
def test_a_config_that_transformers_writes_is_read_to_the_same_values(tmp_path: Path, config: ArgonneConfig) -> None:
    # Through transformers: what it keeps of ours, and in the form in which it keeps it.
    write(tmp_path / "config.json", to_huggingface(config, TOKENS, "float32"))
    LlamaConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert from_huggingface(tmp_path) == config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(tmp_path: Path, name: str) -> None:
    write(tmp_path / "config.json", to_huggingface(PRESETS[name], TOKENS, "float32"))
    assert from_huggingface(tmp_path) == PRESETS[name]


def test_a_file_of_older_transformers_is_read(tmp_path: Path) -> None:
    old = {**PLAIN, "rope_theta": 500_000, "rope_scaling": None, "num_key_value_heads": 3, "head_dim": None}
    config = from_huggingface(write(tmp_path / "config.json", old))
    assert (config.rope_theta, config.num_key_value_heads, config.head_dim) == (500_000.0, 3, 4)


@pytest.mark.parametrize("left_out", [*PLAIN, None])
def test_what_a_file_leaves_out_is_what_llama_config_takes(tmp_path: Path, left_out: str | None) -> None:
    written = {name: value for name, value in PLAIN.items() if name != left_out}
    if left_out in ("hidden_size", "num_attention_heads"):
        written |= {"hidden_size": 192} if left_out == "num_attention_heads" else {"num_attention_heads": 8}
    config = from_huggingface(write(tmp_path / "config.json", written))
    llama = LlamaConfig(**written)
    for field in SHARED:
        assert getattr(config, field) == getattr(llama, field), field
    assert config.rope_theta == llama.rope_parameters["rope_theta"]


def test_a_file_that_says_only_that_it_is_a_llama_is_llama_configs(tmp_path: Path) -> None:
    config, llama = from_huggingface(write(tmp_path / "config.json", {"model_type": "llama"})), LlamaConfig()
    assert {field: getattr(config, field) for field in SHARED} == {field: getattr(llama, field) for field in SHARED}
    assert config.intermediate_size == 11_008


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"model_type": "gemma3"},
            "model_type='gemma3' in {file!r} is not supported; legal: llama, mistral, qwen2, qwen3",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' in {file!r} is not supported; legal: 'silu'"),
        ({"mlp_bias": True}, "mlp_bias=True in {file!r} is not supported; legal: False"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling.type='dynamic' in {file!r} is not supported; legal: default, linear, llama3, yarn",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3"}},
            "model config {file!r}: rope_parameters.factor=None is not legal; legal: a number, more than 0",
        ),
        (
            {"num_key_value_heads": 4},
            "model config {file!r}: num_attention_heads=6 is not divisible by num_key_value_heads=4; "
            "legal sizes: 1, 2, 3, 6",
        ),
    ],
)
def test_what_is_not_a_plain_llama_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "config.json", {**PLAIN, **changed})
    with pytest.raises(ArgonneError) as refusal:
        from_huggingface(tmp_path)
    assert str(refusal.value) == message.format(file=str(file))


@pytest.mark.parametrize(
    "content", [None, b"", b'{"hidden_size": ', b"[1, 2]", b"null", b"\xff\xfe\x00", b'{"hidden_size": "wide"}']
)
def test_a_file_that_cannot_be_read_is_refused_by_its_name(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ArgonneError, match="config.json"):
        from_huggingface(file)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_opens_a_checkpoint_and_computes_the_same_logits(tmp_path: Path, tied: bool) -> None:
    config = ArgonneConfig(24, 2, 6, 3, 50, 40, rope_theta=500.0, max_position_embeddings=32, tie_word_embeddings=tied)
    groups = ProcessGroups.single()
    model = ArgonneModel(config, Execution(groups))
    model.initialise(seed=4)
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.ndim == 1):
            parameter.add_(0.2 * torch.sin(torch.arange(24) + i))
    pieces = weight_pieces(model.sharded_parameters())

    def write_rest(directory: Path) -> None:
        write_json(directory / "config.json", to_huggingface(config, TOKENS, "float32"))

    directory = save_checkpoint(tmp_path, 1, pieces, [], write_rest, groups)
    opened = LlamaForCausalLM.from_pretrained(directory)
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = opened(ids).logits
    weights = {piece.name: piece.part.double() for piece in pieces}
    assert_close(model.logits(ids).detach().double(), dense.logits(weights, config, ids), 1e-6, "our logits")
    assert_close(logits.double(), dense.logits(weights, config, ids), 1e-6, "logits of transformers")
