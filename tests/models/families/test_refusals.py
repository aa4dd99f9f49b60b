"""What a ``config.json`` asks for and no family here has is refused, by field and value, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from argonne.models import ArgonneConfig, RopeScaling, from_huggingface, to_huggingface
from argonne.models.families import DECODERS
from argonne.parallel import ArgonneError

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "vocab_size": 50,
    "intermediate_size": 40,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


def written(directory: Path, family: str, changed: dict[str, Any]) -> Path:
    plain = {"sliding_window": None} if family == "mistral" else {}
    path = directory / "config.json"
    path.write_text(json.dumps({"model_type": family, **SMALL, **plain, **changed}))
    return path


@pytest.mark.parametrize(
    ("family", "changed", "told"),
    [
        # Attention that does not see all that came before.
        ("mistral", {"sliding_window": 4096}, "sliding_window=4096 in {}; legal: None"),
        ("llama", {"sliding_window": 128}, "sliding_window=128 in {}; legal: None"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True in {}; legal: False or None"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=['full_attention', 'sliding"),
        ("qwen3", {"layer_types": "full_attention"}, "layer_types='full_attention' in {}"),
        ("llama", {"attention_chunk_size": 8192}, "attention_chunk_size=8192 in {}; legal: None"),
        # Experts.
        ("qwen3", {"num_experts": 128}, "num_experts=128 in {}; legal: 0 or None"),
        ("mistral", {"num_local_experts": 8}, "num_local_experts=8 in {}; legal: 0 or None"),
        ("llama", {"n_routed_experts": 64}, "n_routed_experts=64 in {}; legal: 0 or None"),
        # Other models altogether.
        ("mixtral", {}, "model_type='mixtral' in {}; legal: llama, mistral, qwen2, qwen3"),
        ("qwen3_moe", {}, "model_type='qwen3_moe' in {}"),
        ("", {}, "model_type='' in {}"),
        ("qwen2", {"architectures": ["Qwen2ForSequenceClassification"]}, "legal: ['Qwen2ForCausalLM']"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config={{'quant_method': 'gptq'}}"),
        # Activations and biases.
        ("qwen2", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act='gelu_pytorch_tanh' in {}; legal: 'silu'"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True in {}; legal: False"),
        ("mistral", {"attention_bias": True}, "attention_bias=True in {}; legal: False or None"),
        ("qwen2", {"attention_bias": False}, "attention_bias=False in {}; legal: True or None"),
        ("llama", {"attention_bias": "true"}, "attention_bias='true' in {}; legal: True or False"),
        # Scales.
        ("llama", {"logits_scaling": 8.0}, "logits_scaling=8.0 in {}; legal: 1.0 or None"),
        ("llama", {"embedding_multiplier": 12}, "embedding_multiplier=12 in {}"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 in {}; legal: None"),
        ("qwen3", {"attention_dropout": 0.1}, "attention_dropout=0.1 in {}; legal: 0.0 or None"),
        # Rotary positions.
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 in {}; legal: 1.0 or None"),
        ("qwen3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor=0.5"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type='dynamic' in {}"),
        ("qwen2", {"rope_scaling": {"rope_type": "longrope"}}, "legal: default, linear, llama3, yarn"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "rope_type": "yarn"}},
            "rope_scaling.type=linear; legal: the same",
        ),
        (
            "qwen2",
            {"rope_scaling": {"type": "default", "mrope_section": [1, 1]}},
            "rope_scaling['mrope_section']=[1, 1]",
        ),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor=None"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5 is not legal; legal: 1 or more"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor='2'"),
        ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "rope_scaling.low_freq_factor=None"),
        ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1}}, "high_freq_factor=1.0 is not more than"),
        ("qwen3", {"rope_parameters": {**YARN, "beta_fast": 0.5}}, "rope_parameters.beta_fast=0.5 is less than"),
        ("qwen3", {"rope_parameters": {**YARN, "original_max_position_embeddings": 8.5}}, "embeddings=8.5"),
        ("qwen3", {"rope_parameters": {**YARN, "truncate": 1}}, "rope_parameters.truncate=1"),
        ("qwen3", {"rope_parameters": {**YARN, "mscale": -1}}, "rope_parameters.mscale=-1"),
        ("qwen3", {"rope_parameters": {**YARN, "rope_theta": 0.5}}, "rope_theta=0.5 is not legal with yarn"),
        ("llama", {"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 8.0}}, "legal: the same in every place"),
        ("llama", {"rope_scaling": YARN, "original_max_position_embeddings": 6}, "embeddings=6, rope_scaling.original"),
        # What no heads can be made of.
        ("qwen3", {"head_dim": None}, "head_dim=None"),
        ("qwen2", {"num_key_value_heads": 4}, "num_attention_heads=6 is not divisible by num_key_value_heads=4"),
    ],
)
def test_what_no_family_has_is_refused_by_field_and_value(
    tmp_path: Path, family: str, changed: dict[str, Any], told: str
) -> None:
    path = written(tmp_path, family, changed)
    with pytest.raises(ArgonneError, match="legal") as refusal:
        from_huggingface(tmp_path)
    assert told.format(f"{str(path)!r} is not supported") in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_silent_mistral_is_refused_for_the_window_that_its_class_assumes(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "mistral", **SMALL}))
    with pytest.raises(ArgonneError, match=r"sliding_window \(left out\)=4096 in .*legal: None"):
        from_huggingface(path)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("left_out", [None, *SMALL])
def test_what_a_file_leaves_out_is_what_the_familys_class_assumes(
    tmp_path: Path, family: str, left_out: str | None
) -> None:
    path = written(tmp_path, family, {})
    told = {name: value for name, value in json.loads(path.read_text()).items() if name != left_out}
    if left_out in ("hidden_size", "num_attention_heads"):
        told |= {"hidden_size": 192, "num_attention_heads": 32, "num_key_value_heads": 4}
        del told[left_out]
    elif left_out == "num_key_value_heads":
        told |= {"hidden_size": 192, "num_attention_heads": 32}
    elif left_out is None:
        told = {"sliding_window": None}
    path.write_text(json.dumps({**told, "model_type": family}))
    told.pop("model_type", None)
    config, theirs = from_huggingface(path), AutoConfig.for_model(family, **told)
    names = [*SMALL, "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range"]
    dim = theirs.hidden_size // theirs.num_attention_heads
    expected = {name: getattr(theirs, name, dim if name == "head_dim" else None) for name in names}
    assert {name: getattr(config, name) for name in names} == expected
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("family", DECODERS)
def test_fields_that_mean_nothing_else_are_taken(tmp_path: Path, family: str) -> None:
    config = from_huggingface(written(tmp_path, family, {}))
    plain = {"use_sliding_window": False, "num_experts": 0, "layer_types": ["full_attention"] * 2, "rope_scaling": {}}
    plain |= {"quantization_config": None, "pretraining_tp": 1, "max_window_layers": 28, "logits_scaling": 1}
    if family.startswith("qwen"):
        plain["sliding_window"] = 4096
    assert from_huggingface(written(tmp_path, family, plain)) == config
    linear = {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2, "beta_fast": 3.0, "unknown": None}}
    assert from_huggingface(written(tmp_path, family, linear)).rope_scaling == RopeScaling("linear", 2.0)
    yarn = {"rope_scaling": YARN, "original_max_position_embeddings": 8}
    assert from_huggingface(written(tmp_path, family, yarn)).rope_scaling == RopeScaling(**YARN)


def test_a_file_without_an_original_context_was_trained_on_its_longest_sequence(tmp_path: Path) -> None:
    path = written(tmp_path, "llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}, "max_position_embeddings": 32})
    theirs = AutoConfig.from_pretrained(path.parent).rope_parameters["original_max_position_embeddings"]
    scaling = from_huggingface(path).rope_scaling
    assert scaling is not None
    assert scaling.original_max_position_embeddings == theirs == 32


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"qk_norm": True}, "qk_norm=True is not offered by family='llama' with attention_bias=False; legal: False"),
        ({"family": "qwen3"}, "qk_norm=False is not offered by family='qwen3' with attention_bias=False; legal: True"),
        ({"attention_bias": True}, "output_bias=False is not offered by family='llama' with attention_bias=True"),
        ({"family": "qwen2"}, "attention_bias=False is not offered by family='qwen2'; legal: True"),
        ({"family": "mistral", "attention_bias": True}, "attention_bias=True is not offered by family='mistral'"),
        ({"family": "gemma"}, "family='gemma' is not known; legal: llama, mistral, qwen2, qwen3"),
    ],
)
def test_a_shape_that_is_none_of_its_familys_cannot_be_saved(changed: dict[str, Any], told: str) -> None:
    config = ArgonneConfig(**{**SMALL, **changed})
    with pytest.raises(ArgonneError) as refusal:
        to_huggingface(config, {}, "float32")
    assert told in str(refusal.value)
