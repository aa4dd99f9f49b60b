"""The presets are the sizes they say, and a shape that cannot be is refused with what would be legal."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import FrozenInstanceError, asdict, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from argonne.models import ArgonneConfig, ArgonneModel, Execution, RopeScaling, build, preset
from argonne.models.config import PRESETS, feed_forward_size
from argonne.models.families import decoder_family
from argonne.parallel import ArgonneError, Layout, LayoutError, ProcessGroups

SMALL = ArgonneConfig(24, 2, 6, 3, 50)

PARAMETERS = {
    "argonne-2.0-4.9b": 4_918_072_800,
    "argonne-2.0-2b": 2_416_392_192,
    "argonne-2.5-1b": 1_066_207_232,
    "argonne-2.0-8b": 16_970_470_400,
}
# layers, hidden, heads, key-value heads, head_dim, feed-forward, context, vocabulary, tied
SHAPES = {
    "argonne-2.0-4.9b": (24, 4080, 24, 8, 170, 11008, 4096, 151_665, True),
    "argonne-2.0-2b": (20, 3072, 24, 4, 128, 8192, 4096, 151_665, True),
    "argonne-2.5-1b": (16, 2048, 16, 8, 128, 5632, 4096, 151_936, True),
    "argonne-2.0-8b": (56, 5120, 40, 8, 128, 13824, 4096, 151_936, False),
}


def counted(config: ArgonneConfig) -> int:
    """The elements of the parameters that a model of this shape has, padding left out."""
    with torch.device("meta"):
        model = ArgonneModel(config, Execution(ProcessGroups.single()))
    return sum(math.prod(region.shape) for s in model.sharded_parameters() for region in s.spec.regions)


@pytest.mark.parametrize("name", PARAMETERS)
def test_preset_has_exactly_the_parameters_of_its_model_card(name: str) -> None:
    assert counted(preset(name)) == PARAMETERS[name]
    assert preset(name).parameter_count == PARAMETERS[name]


@pytest.mark.parametrize("name", SHAPES)
def test_preset_has_the_dimensions_of_its_model_card(name: str) -> None:
    c = preset(name)
    found = (
        c.num_hidden_layers,
        c.hidden_size,
        c.num_attention_heads,
        c.num_key_value_heads,
        c.head_dim,
        c.intermediate_size,
        c.max_position_embeddings,
        c.vocab_size,
        c.tie_word_embeddings,
    )
    assert found == SHAPES[name]
    assert (c.rms_norm_eps, c.rope_theta) == (1e-6, 10_000.0)
    assert c.initializer_range == c.hidden_size**-0.5


def test_every_preset_is_counted_and_demo_is_small() -> None:
    assert set(PRESETS) == {*PARAMETERS, "demo"}
    demo = preset("demo")
    assert counted(demo) == demo.parameter_count < 10_000_000


@given(
    hidden=st.integers(1, 40),
    layers=st.integers(1, 3),
    kv=st.integers(1, 4),
    group=st.integers(1, 4),
    dim=st.integers(1, 6),
    ffn=st.integers(1, 50),
    vocabulary=st.integers(1, 70),
    tied=st.booleans(),
    family=st.sampled_from([("llama", False), ("llama", True), ("qwen2", True), ("qwen3", False), ("qwen3", True)]),
)
def test_closed_form_equals_the_parameters_of_the_model(
    hidden: int,
    layers: int,
    kv: int,
    group: int,
    dim: int,
    ffn: int,
    vocabulary: int,
    tied: bool,
    family: tuple[str, bool],
) -> None:
    config = ArgonneConfig(hidden, layers, kv * group, kv, vocabulary, ffn, 2 * dim, 8, tie_word_embeddings=tied)
    config = replace(config, **decoder_family(family[0]).features(family[1]))
    assert config.parameter_count == counted(config)


@given(st.integers(1, 100_000))
def test_feed_forward_size_is_eight_thirds_rounded_up_to_256(hidden: int) -> None:
    size = feed_forward_size(hidden)
    floor = 8 * hidden // 3  # the 2.x code truncates before it rounds up
    assert size % 256 == 0
    assert floor <= size < floor + 256
    assert ArgonneConfig(hidden, 1, 1, 1, 8, head_dim=2).intermediate_size == size


@pytest.mark.parametrize(
    ("hidden", "size"), [(4080, 11008), (3072, 8192), (2048, 5632), (5120, 13824), (96, 256), (97, 512)]
)
def test_feed_forward_sizes_that_the_presets_rely_on(hidden: int, size: int) -> None:
    assert feed_forward_size(hidden) == size


def test_what_is_left_out_is_derived_and_what_is_given_is_kept() -> None:
    assert (SMALL.head_dim, SMALL.intermediate_size, SMALL.initializer_range) == (4, 256, 24**-0.5)
    chosen = replace(SMALL, head_dim=10, intermediate_size=7, initializer_range=0.02)
    assert (chosen.head_dim, chosen.intermediate_size, chosen.initializer_range) == (10, 7, 0.02)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_size": 960},
        {"hidden_size": 1920, "num_attention_heads": 60, "num_key_value_heads": 20},
        {"num_attention_heads": 120, "num_key_value_heads": 40, "hidden_size": 240},
        {"hidden_size": 480, "head_dim": 128},
        {"hidden_size": 480, "intermediate_size": 11008, "initializer_range": 0.3},
        {"num_hidden_layers": 3, "vocab_size": 77},
    ],
    ids=str,
)
def test_replacing_what_others_follow_from_derives_them_again(name: str, changed: dict[str, Any]) -> None:
    """Also in two steps, and from a copy that went through another process; what is given stays."""
    base = preset(name)
    whole = {field: getattr(base, field) for field in given_by(name)} | changed
    expected = ArgonneConfig(**whole)
    assert replace(base, **changed) == expected
    assert replace(replace(base, hidden_size=4800), **({"hidden_size": base.hidden_size} | changed)) == expected
    assert replace(pickle.loads(pickle.dumps(copy.deepcopy(base))), **changed) == expected


def given_by(name: str) -> set[str]:
    """The fields of a preset that it does not derive."""
    derived = {"head_dim", "intermediate_size", "initializer_range"} - (
        {"initializer_range"} if name == "demo" else set()
    )
    return {field.name for field in fields(ArgonneConfig)} - derived


def test_a_derived_number_is_kept_where_it_is_given_as_one_of_its_own() -> None:
    assert replace(SMALL, hidden_size=48).head_dim == 8
    assert replace(SMALL, hidden_size=48, head_dim=int(SMALL.head_dim)).head_dim == 4
    assert replace(replace(SMALL, head_dim=10), head_dim=None).head_dim == 4


def test_a_derived_shape_is_the_shape_that_says_the_same_numbers() -> None:
    """Equal, of one hash, and the same JSON: what a run is does not depend on who worked its numbers out."""
    said = ArgonneConfig(24, 2, 6, 3, 50, intermediate_size=256, head_dim=4, initializer_range=24**-0.5)
    assert said == SMALL
    assert hash(said) == hash(SMALL)
    assert repr(said) == repr(SMALL)
    assert json.dumps(asdict(said)) == json.dumps(asdict(SMALL))
    assert {type(value) for value in SMALL.as_json().values()} == {int, float, bool}
    assert ArgonneConfig(**json.loads(json.dumps(asdict(SMALL)))) == SMALL
    with pytest.raises(FrozenInstanceError):
        SMALL.head_dim = 8  # type: ignore[misc]


def test_the_json_of_a_shape_makes_it_again_and_a_plain_llamas_is_what_it_was_before_there_were_others() -> None:
    assert not {"family", "attention_bias", "output_bias", "qk_norm", "rope_scaling"} & set(SMALL.as_json())
    scaling = RopeScaling("yarn", 4, original_max_position_embeddings=8, truncate=False)
    qwen = replace(SMALL, rope_scaling=scaling, **decoder_family("qwen3").features(True))
    told = json.loads(json.dumps(qwen.as_json()))
    assert told["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "truncate": False,
    }
    assert ArgonneConfig(**told) == qwen
    assert ArgonneConfig(**SMALL.as_json()) == SMALL
    for scaled in ("linear", 4, [scaling]):
        with pytest.raises(ArgonneError, match="rope_scaling=.*legal"):
            replace(SMALL, rope_scaling=scaled)


def test_derived_numbers_are_numbers_to_a_compiler() -> None:
    config = ArgonneConfig(8, 1, 2, 1, 5)
    widen = torch.compile(lambda x: x.unflatten(-1, (-1, config.head_dim)) * config.initializer_range, backend="eager")
    x = torch.arange(16.0).view(2, 8)
    assert torch.equal(widen(x), x.view(2, 2, 4) * 8**-0.5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0 is not legal; legal: 1 or more"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is not legal; legal: 1 or more"),
        ({"num_attention_heads": -6}, "num_attention_heads=-6 is not legal; legal: 1 or more"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 is not legal; legal: 1 or more"),
        ({"vocab_size": 0}, "vocab_size=0 is not legal; legal: 1 or more"),
        (
            {"num_key_value_heads": 4},
            "num_attention_heads=6 is not divisible by num_key_value_heads=4; legal sizes: 1, 2, 3, 6",
        ),
        (
            {"hidden_size": 25},
            "hidden_size=25 is not divisible by num_attention_heads=6; legal sizes: 1, 5, 25",
        ),
        ({"head_dim": 5}, "head_dim=5 is odd; rotary positions rotate pairs, legal: even numbers"),
    ],
)
def test_an_impossible_shape_is_refused_with_what_is_legal(changed: dict[str, int], message: str) -> None:
    with pytest.raises(ArgonneError) as refusal:
        replace(SMALL, **changed)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    "changed",
    [
        {"intermediate_size": -8},
        {"head_dim": -2},
        {"head_dim": 0},
        {"intermediate_size": 0},
        {"initializer_range": 0},
        {"initializer_range": 0.0},
        {"initializer_range": float("nan")},
        {"head_dim": True},
        {"intermediate_size": 8.0},
        {"max_position_embeddings": 0},
        {"rms_norm_eps": -1.0},
        {"rope_theta": 0.0},
        {"initializer_range": -0.02},
    ],
)
def test_every_other_field_out_of_range_is_refused_by_its_name(changed: dict[str, float]) -> None:
    ((name, value),) = changed.items()
    with pytest.raises(ArgonneError, match=f"^{name}={value} .*legal"):
        replace(SMALL, **changed)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "argonne-2.0-4.9b",
            5,
            "num_attention_heads=24 is not divisible by tensor_parallel=5; legal sizes: 1, 2, 4, 8",
        ),
        (
            "argonne-2.0-4.9b",
            3,
            "intermediate_size=11008 is not divisible by tensor_parallel=3; legal sizes: 1, 2, 4, 8",
        ),
        (
            "argonne-2.5-1b",
            32,
            "num_attention_heads=16 is not divisible by tensor_parallel=32; legal sizes: 1, 2, 4, 8, 16",
        ),
        (
            "argonne-2.0-8b",
            3,
            "num_attention_heads=40 is not divisible by tensor_parallel=3; legal sizes: 1, 2, 4, 8",
        ),
    ],
)
def test_a_layout_that_cannot_share_the_model_is_refused_with_the_legal_sizes(
    name: str, tensor: int, message: str
) -> None:
    with pytest.raises(LayoutError) as refusal:
        preset(name).check_layout(Layout(tensor=tensor))
    assert str(refusal.value) == f"{message} (or uneven_shards, which gives some ranks one more than others)"

    with pytest.raises(LayoutError), torch.device("meta"):
        ArgonneModel(preset(name), Execution(replace(ProcessGroups.single(), layout=Layout(tensor=tensor))))


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 60), st.integers(1, 50))
def test_legal_tensor_sizes_divide_the_heads_and_the_feed_forward_whatever_the_vocabulary(
    kv: int, group: int, ffn: int, vocabulary: int
) -> None:
    config = ArgonneConfig(6, 1, kv * group, kv, vocabulary, ffn, 2)
    for tensor in range(1, 50):
        legal = (kv * group) % tensor == 0 and ffn % tensor == 0
        if legal:
            config.check_layout(Layout(tensor=tensor))
        else:
            with pytest.raises(LayoutError):
                config.check_layout(Layout(tensor=tensor))


def test_an_unknown_preset_is_refused_with_the_names() -> None:
    with pytest.raises(ArgonneError) as refusal:
        preset("argonne-3")
    assert str(refusal.value) == f"preset='argonne-3' is not known; legal: {', '.join(build.PRESETS)}"


def test_uneven_shards_allow_any_number_of_ranks_up_to_the_heads() -> None:
    for tensor in (3, 5, 23, 24):
        preset("argonne-2.0-4.9b").check_layout(Layout(tensor=tensor, uneven_shards=True))
    with pytest.raises(LayoutError) as refusal:
        preset("argonne-2.0-4.9b").check_layout(Layout(tensor=25, uneven_shards=True))
    assert str(refusal.value) == "num_attention_heads=24 is less than tensor_parallel=25; legal sizes: 1 to 24"
