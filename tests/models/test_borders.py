"""What a ``config.json`` or a program says of a model is taken as it is meant, or refused by its field and value."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from argonne.files import read_json, write_json
from argonne.models import ArgonneConfig, from_huggingface
from argonne.parallel import ArgonneError
from argonne.parallel.communication.layout import divisors
from tests.models.test_huggingface import PLAIN, REUSED_DIRECTORY, write

SMALL = ArgonneConfig(24, 2, 6, 3, 50)
WHOLE = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "intermediate_size",
    "head_dim",
    "max_position_embeddings",
]
REAL = ["rms_norm_eps", "rope_theta", "initializer_range"]
NO_NUMBERS: list[Any] = ["24", "", True, False, [24], {}, math.nan, math.inf, -math.inf, -1]
NOT_WHOLE = [*NO_NUMBERS, 24.0, 2**31, 10**23, -(10**23)]
NOT_REAL = [*NO_NUMBERS, 10**400, 1e39, -0.5]


@pytest.mark.parametrize("field", [*WHOLE, *REAL])
def test_a_number_of_another_type_or_out_of_bounds_is_refused_in_a_file_and_in_a_program(
    tmp_path: Path, field: str
) -> None:
    for value in [*(NOT_WHOLE if field in WHOLE else NOT_REAL), 0, 0.0]:
        file = write(tmp_path / "config.json", {**PLAIN, field: value})
        with pytest.raises(ArgonneError, match="legal") as refusal:
            from_huggingface(file)
        assert f"{field}={value!r}" in str(refusal.value)
        assert str(file) in str(refusal.value)
        if value == 0 and field in ("intermediate_size", "head_dim", "initializer_range") and value is not False:
            continue  # of a program that means: derive it
        with pytest.raises(ArgonneError, match="legal") as refusal:
            dataclasses.replace(SMALL, **{field: value})
        assert f"{field}={value!r}" in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("field", [*WHOLE, *REAL, "tie_word_embeddings"])
def test_null_is_refused_unless_the_value_follows_from_others(tmp_path: Path, field: str) -> None:
    file = write(tmp_path / "config.json", {**PLAIN, field: None})
    if field in ("num_key_value_heads", "head_dim"):
        assert from_huggingface(file) == from_huggingface(write(tmp_path / "plain.json", PLAIN))
    else:
        with pytest.raises(ArgonneError, match=f"{field}=None .*legal"):
            from_huggingface(file)


@pytest.mark.parametrize("field", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", ["false", "False", "", 0, 1, 0.0, None, []])
def test_a_truth_value_of_another_type_is_refused(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(ArgonneError, match=f"{field}=.*legal"):
        from_huggingface(write(tmp_path / "config.json", {**PLAIN, field: value}))
    if field == "tie_word_embeddings":
        with pytest.raises(ArgonneError, match=f"{field}=.*legal: True, False"):
            dataclasses.replace(SMALL, tie_word_embeddings=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"rope_parameters": "default"}, "rope_parameters='default'"),
        ({"rope_scaling": ["linear"]}, "rope_scaling=['linear']"),
        ({"rope_scaling": 0}, "rope_scaling=0"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope'"),
        ({"rope_parameters": {"rope_type": None}}, "rope_type=None"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type=['yarn']"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear"}}, "rope_scaling.factor=None"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "rope_parameters['full_attention']="),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta=0"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters.rope_theta='1e4'"),
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 6.0}, "rope_parameters.rope_theta=5.0, rope_theta=6.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"attention_dropout": "0"}, "attention_dropout='0'"),
        ({"hidden_act": None}, "hidden_act=None"),
        ({"hidden_act": ["silu"]}, "hidden_act=['silu']"),
        ({"model_type": ["llama"]}, "model_type=['llama']"),
        ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures=["),
    ],
)
def test_what_is_no_plain_llama_is_refused_whatever_its_type(
    tmp_path: Path, changed: dict[str, Any], expected: str
) -> None:
    file = write(tmp_path / "config.json", {**PLAIN, **changed})
    with pytest.raises(ArgonneError, match="legal") as refusal:
        from_huggingface(file)
    assert expected in str(refusal.value)
    assert str(file) in str(refusal.value)


def test_what_means_nothing_else_is_taken(tmp_path: Path) -> None:
    plain = from_huggingface(write(tmp_path / "config.json", PLAIN))
    for same in (
        {"attention_dropout": 0, "partial_rotary_factor": 1, "rope_theta": 10_000, "architectures": None},
        {"attention_dropout": None, "partial_rotary_factor": None, "rope_scaling": {}, "pretraining_tp": 2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 10_000, "unknown": [1]},
        {"rope_scaling": {"type": "default"}, "architectures": ["LlamaForCausalLM"], "use_cache": False},
    ):
        assert from_huggingface(write(tmp_path / "config.json", {**PLAIN, **same})) == plain


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
NAMES = [*WHOLE, *REAL, *PLAIN, "tie_word_embeddings", "rope_parameters", "rope_scaling", "hidden_act", "architectures"]


@given(st.dictionaries(st.sampled_from(NAMES), JSON, min_size=1, max_size=3))
@settings(REUSED_DIRECTORY, max_examples=300, deadline=None)
def test_any_file_gives_a_legal_shape_or_one_line(tmp_path: Path, changed: dict[str, Any]) -> None:
    file = write(tmp_path / "config.json", {**PLAIN, **changed})
    config, refusal = None, ""
    try:
        config = from_huggingface(file)
    except ArgonneError as error:
        refusal = str(error)
    if config is None:
        assert str(file) in refusal
        assert "\n" not in refusal
    else:
        values = dataclasses.asdict(config)
        assert all(type(values[name]) is int and values[name] >= 1 for name in WHOLE)
        assert all(type(values[name]) is float and 0 < values[name] < math.inf for name in REAL)
        assert all(type(values[name]) is bool for name in ("tie_word_embeddings", "attention_bias", "qk_norm"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"hidden_size": 24, "hidden_size": 48}', "'hidden_size' twice"),
        (b'{"rope_parameters": {"a": 1, "a": 1}}', "'a' twice"),
        (b'\xef\xbb\xbf{"model_type": "llama"}', "BOM"),
        ('{"model_type": "llama"}'.encode("utf-16"), "utf-8"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "digits"),
        (b"{}", "describes no model"),
    ],
    ids=["nested", "twice", "twice within", "byte order mark", "utf-16", "digits", "empty"],
)
def test_a_file_that_is_no_json_of_a_model_is_refused_in_one_line(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ArgonneError) as refusal:
        from_huggingface(file)
    assert expected in str(refusal.value)
    assert str(file) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_written_as_json_is_json(tmp_path: Path, value: float) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"text": "\u00e9", "value": 1.5})
    assert read_json(path) == json.loads(path.read_bytes().decode()) == {"text": "\u00e9", "value": 1.5}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"rates": [value]})
    assert [each.name for each in tmp_path.iterdir()] == ["run.json"]
    assert read_json(path)["value"] == 1.5


@given(st.integers(1, 5000))
def test_divisors_are_all_of_them_in_order(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]
