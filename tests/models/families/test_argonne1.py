"""The shape of Argonne 1.x, and its files, which are GPT-2's: transformers opens ours, and we open theirs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from argonne.checkpoint import load_pieces, save_checkpoint, weight_pieces
from argonne.files import write_json
from argonne.models import Argonne1Config, Argonne1Model, Execution, build_model, from_huggingface, preset
from argonne.models.families import to_huggingface
from argonne.models.families.argonne1 import _NAMES
from argonne.parallel import ArgonneError, Layout, Precision, ProcessGroups
from tests.models.argonne1_runs import PLAIN, TIED, VOCABULARY, their_model
from tests.pool import RankPool
from tests.whole import assert_close

TOKENS: dict[str, int | None] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
DOUBLE = Precision(torch.float64, torch.float64)
REUSED_DIRECTORY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
SMALL = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 6, "vocab_size": 50, "n_positions": 16}


@pytest.mark.parametrize(("name", "count"), [("argonne-1.0", 275_827_680), ("argonne-1.5", 356_516_640)])
def test_presets_have_the_published_number_of_parameters(name: str, count: int) -> None:
    config = preset(name)
    assert isinstance(config, Argonne1Config)
    assert config.parameter_count == count
    with torch.device("meta"):
        model = build_model(config, Execution(ProcessGroups.single()))
    assert isinstance(model, Argonne1Model)
    regions = [region for sharded in model.sharded_parameters() for region in sharded.spec.regions]
    assert sum(torch.Size(region.shape).numel() for region in regions) == count
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(GPT2Config(**to_huggingface(config, TOKENS, "float32")))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count
    assert {region.name: list(region.whole_shape) for region in regions} == {
        name: list(parameter.shape) for name, parameter in theirs.named_parameters()
    }
    assert config.flops_per_token(2048) == 6 * (count - (12_000 + 2048) * 1296) + 6 * config.num_hidden_layers * (
        1296 * 2048
    )


@st.composite
def configs(draw: st.DrawFn) -> Argonne1Config:
    heads = draw(st.integers(1, 6))
    return Argonne1Config(
        hidden_size=heads * draw(st.integers(1, 9)),
        num_hidden_layers=draw(st.integers(1, 5)),
        num_attention_heads=heads,
        vocab_size=draw(st.integers(8, 999)),
        intermediate_size=draw(st.none() | st.integers(1, 99)),
        max_position_embeddings=draw(st.integers(1, 9999)),
        layer_norm_eps=draw(st.floats(1e-9, 1e-2)),
        activation=draw(st.sampled_from(["gelu", "gelu_new"])),
        embedding_dropout=draw(st.floats(0, 0.9)),
        attention_dropout=draw(st.floats(0, 0.9)),
        residual_dropout=draw(st.floats(0, 0.9)),
        tie_word_embeddings=draw(st.booleans()),
        initializer_range=draw(st.floats(1e-4, 1.0)),
    )


@given(configs())
@REUSED_DIRECTORY
def test_a_config_goes_through_our_file_and_through_theirs(tmp_path: Path, config: Argonne1Config) -> None:
    write_json(tmp_path / "config.json", to_huggingface(config, TOKENS, "float32"))
    assert from_huggingface(tmp_path) == config
    theirs = GPT2Config.from_pretrained(tmp_path)
    for field, name in _NAMES.items():
        own = None if field == "intermediate_size" and theirs.n_inner is None else getattr(config, field)
        assert getattr(theirs, name) == own, name
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, None)
    theirs.save_pretrained(tmp_path)
    assert from_huggingface(tmp_path) == config
    assert Argonne1Config(**json.loads(json.dumps(config.as_json()))) == config


def test_a_file_that_says_little_is_what_gpt2_config_makes_of_it(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "gpt2"})
    config, theirs = from_huggingface(tmp_path), GPT2Config()
    for field, name in _NAMES.items():
        assert getattr(config, field) == (
            getattr(theirs, name) or 4 * 768 if name == "n_inner" else getattr(theirs, name)
        )


def test_a_width_that_follows_another_follows_it_when_that_is_changed() -> None:
    assert replace(preset("argonne-1.5"), hidden_size=32).intermediate_size == 128  # type: ignore[type-var]
    assert replace(PLAIN, hidden_size=48).intermediate_size == 40


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"activation_function": "relu"}, "activation_function='relu' in {file!r} is not supported; legal: 'gelu' or"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True in {file!r} is not"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False in {file!r} is not supported; legal: True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True in {file!r} is not supported; legal: False"),
        ({"add_cross_attention": True}, "add_cross_attention=True in {file!r} is not supported; legal: False"),
        ({"architectures": ["GPT2ForSequenceClassification"]}, "architectures=['GPT2ForSequenceClassification'] in"),
        ({"n_head": 5}, "model config {file!r}: hidden_size=24 is not divisible by num_attention_heads=5"),
        ({"attn_pdrop": 1.0}, "model config {file!r}: attention_dropout=1 is not legal, as nothing would stay"),
        ({"n_layer": 0}, "model config {file!r}: num_hidden_layers=0 is not legal"),
        ({"tie_word_embeddings": None}, "model config {file!r}: tie_word_embeddings=None is not legal"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={{'bits': 4}} in {file!r} is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_it_does_not_have_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    file = tmp_path / "config.json"
    write_json(file, {**SMALL, **changed})
    with pytest.raises(ArgonneError) as refusal:
        from_huggingface(tmp_path)
    assert message.format(file=str(file)) in str(refusal.value)


def opened_and_saved(groups: ProcessGroups, directory: Path, again: Path) -> tuple[torch.Tensor, Path]:
    """Their directory in our model: the last logits of some ids, and what is saved of it."""
    model = build_model(from_huggingface(directory), Execution(groups, DOUBLE))
    parameters = model.sharded_parameters()
    model.initialise(0)
    with torch.no_grad():
        load_pieces(directory, weight_pieces(parameters))

    def write_rest(to: Path) -> None:
        write_json(to / "config.json", model.config_json(7, TOKENS, "float64"))

    saved = save_checkpoint(again, 1, weight_pieces(parameters), [], write_rest, groups)
    return model.next_token_logits(ids()), saved


def ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("config", [PLAIN, TIED], ids=["untied", "tied, gelu_new"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2, sequence_parallel=True)], ids=str)
def test_their_directory_opens_and_what_is_saved_of_it_is_the_same(
    ranks: RankPool, tmp_path: Path, config: Argonne1Config, layout: Layout
) -> None:
    theirs = their_model(config).eval()
    bare = config is TIED and layout.tensor > 1  # saved as a GPT2Model, whose names lack the prefix
    (theirs.transformer if bare else theirs).save_pretrained(tmp_path / "theirs")
    expected = theirs(ids()).logits.detach()
    results = ranks.run(layout, opened_and_saved, tmp_path / "theirs", tmp_path / "ours")
    for logits, _ in results:
        assert_close(logits, expected[:, -1], 1e-10, "logits")
    saved = results[0][1]
    reopened = GPT2LMHeadModel.from_pretrained(saved, dtype=torch.float64).eval()
    assert_close(reopened(ids()).logits, expected, 1e-12, "logits of what was saved")
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    before = {f"transformer.{name}" if bare else name: value for name, value in stored.items()}
    after = {name: value for file in saved.glob("model-*") for name, value in load_file(file).items()}
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_learned_positions_begin_anew_with_each_document() -> None:
    model = Argonne1Model(replace(PLAIN, max_position_embeddings=8), Execution(ProcessGroups.single(), DOUBLE))
    model.initialise(seed=4)
    ids = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(6))
    documents = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2], [5, 5, 5, 5, 5, 3, 3, 3]])
    with torch.no_grad():
        packed = model.logits(ids, documents)
        for row, lengths in enumerate(((3, 1, 4), (5, 3))):
            alone = [model.logits(part[None])[0] for part in ids[row].split(lengths)]
            assert_close(packed[row], torch.cat(alone), 1e-12, f"row {row}")
