"""A run of Argonne 1.x in this very process: its flags, and the same whether it is stopped or not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from argonne.models import Argonne1Config, Batch
from argonne.parallel import ArgonneError
from argonne.training import trainer
from argonne.training.config import ModelFlags, RunConfig
from argonne.training.run.checks import check
from argonne.training.run.workflow import pretrain
from argonne.training.step import train_step
from tests.integration.runs import history, metrics, weights
from tests.training.small_run import small_run

FLAGS = ModelFlags(
    "argonne-1.5",
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=400,
    max_position_embeddings=24,
    dropout=0.2,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return replace(small_run(tmp_path_factory.mktemp("argonne1")), model=FLAGS)


@pytest.fixture(scope="module")
def whole(config: RunConfig) -> Path:
    """The four steps without a stop."""
    assert pretrain(config) == 0
    return config.run.output_dir


def other(config: RunConfig, directory: str, **flags: Any) -> RunConfig:
    """In another directory, and with other flags of training or of where it stops."""
    run = replace(config.run, output_dir=config.run.output_dir.parent / directory)
    stop = flags.pop("stop_at_step", None)
    return replace(config, run=replace(run, stop_at_step=stop), training=replace(config.training, **flags))


def test_a_run_that_is_stopped_and_continued_drops_what_the_undisturbed_one_does(
    config: RunConfig, whole: Path
) -> None:
    for stop in (1, 3, None):
        assert pretrain(other(config, "stopped", stop_at_step=stop)) == 0
    assert history(config.run.output_dir.parent / "stopped") == history(whole)
    assert weights(config.run.output_dir.parent / "stopped") == weights(whole)


def test_every_step_draws_by_its_own_number_and_its_samples_by_theirs(
    config: RunConfig, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int, list[int]]] = []

    def spy(learner: Any, batch: Batch, *arguments: Any) -> Any:
        assert batch.draws is not None
        told.append((batch.draws.seed, batch.draws.step, sorted(batch.draws.samples.flatten().tolist())))
        return train_step(learner, batch, *arguments)

    monkeypatch.setattr(trainer, "train_step", spy)
    for stop in (2, None):  # a run that goes on counts on
        assert pretrain(other(config, "counted", stop_at_step=stop)) == 0
    seed = config.training.seed
    assert told == [(seed, step + 1, list(range(4 * step, 4 * step + 4))) for step in range(4)]


def test_other_micro_batches_of_the_same_samples_drop_the_same(config: RunConfig, whole: Path) -> None:
    again = other(config, "cut", initial_batch_size=1, gradient_accumulation_steps=4, precision="fp64")
    once = other(config, "once", initial_batch_size=4, gradient_accumulation_steps=1, precision="fp64")
    found = []
    for run in (again, once):
        run = replace(run, training=replace(run.training, disable_gradient_checkpointing=run is once))
        assert pretrain(run) == 0
        found.append([line["loss"] for line in metrics(run.run.output_dir)])
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    assert found[0] == pytest.approx([line["loss"] for line in metrics(whole)], rel=1e-5)


def test_a_checkpoint_opens_in_transformers(whole: Path) -> None:
    found = json.loads((whole / "step_00000004" / "config.json").read_text())
    said = {"n_positions": 24, "n_inner": None, "attn_pdrop": 0.2, "embd_pdrop": 0.2, "resid_pdrop": 0.2}
    said |= {"activation_function": "gelu", "tie_word_embeddings": False, "architectures": ["GPT2LMHeadModel"]}
    assert {name: found[name] for name in said} == said
    model = GPT2LMHeadModel.from_pretrained(whole / "step_00000004")
    assert model(torch.arange(24)[None]).logits.isfinite().all()


def test_another_dropout_is_another_run(config: RunConfig, whole: Path) -> None:
    for changed in ({"dropout": 0.3}, {"max_position_embeddings": 32}):
        with pytest.raises(ArgonneError, match="different run"):
            pretrain(replace(config, model=replace(FLAGS, **changed)))


def test_flags_make_the_shape() -> None:
    assert ModelFlags("argonne-1.0").resolve(2048) == Argonne1Config(1296, 12, 12, 12_000)
    shape = replace(FLAGS, tie_word_embeddings=True, initializer_range=0.5, intermediate_size=7).resolve(16)
    assert shape == Argonne1Config(16, 2, 2, 400, 7, 24, 1e-5, "gelu", 0.2, 0.2, 0.2, True, 0.5)


def test_a_file_gives_the_shape_and_a_changed_width_has_a_feed_forward_layer_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "gpt2", "n_embd": 24, "n_head": 4, "n_inner": 50, "n_positions": 32}')
    assert ModelFlags(model_config=file).resolve(32).intermediate_size == 50
    shape = ModelFlags(model_config=file, hidden_size=32).resolve(32)
    assert isinstance(shape, Argonne1Config)
    assert (shape.intermediate_size, shape.activation, shape.tie_word_embeddings) == (128, "gelu_new", True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rope_theta": 5.0}, "rope_theta=5.0 is not offered by Argonne 1.x"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 is not offered by Argonne 1.x"),
        ({"head_dim": 8}, "head_dim=8 is not offered by Argonne 1.x"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06 is not offered by Argonne 1.x"),
        ({"family": "llama"}, "family='llama' is not offered by Argonne 1.x"),
        ({"attention_bias": False}, "attention_bias=False is not offered by Argonne 1.x"),
        ({"dropout": 1.0}, "dropout=1 is not legal, as nothing would stay; legal: 0 up to less than 1"),
        ({"dropout": -0.5}, "dropout=-0.5 is not legal"),
        ({"max_position_embeddings": 15}, "block_size=16 is more than max_position_embeddings=15, the positions that"),
        ({"preset": "demo"}, "max_position_embeddings=24 is not offered by this model; legal: leave it out"),
        ({"preset": "demo", "max_position_embeddings": None}, "dropout=0.2 is not offered by this model"),
    ],
    ids=str,
)
def test_flags_that_it_does_not_have_are_refused_by_name(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgonneError) as refusal:
        replace(FLAGS, **flags).resolve(16)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"context_parallel": 2}, "context_parallel=2 is not offered by Argonne 1.x"),
        ({"reproducible": True}, "reproducible=True is not offered by Argonne 1.x"),
        ({"reproducible": True, "reproducible_blocks": 2}, "reproducible=True is not offered by Argonne 1.x"),
        ({"tensor_parallel": 4}, "num_attention_heads=2 is not divisible by tensor_parallel=4"),
    ],
    ids=str,
)
def test_layouts_that_it_does_not_have_are_refused_before_anything_starts(
    config: RunConfig, parallel: dict[str, Any], message: str
) -> None:
    asked = replace(config, parallel=replace(config.parallel, **parallel))
    with pytest.raises(ArgonneError) as refusal:
        check(asked, 4 if "tensor_parallel" in parallel else 2)
    assert message in str(refusal.value)
