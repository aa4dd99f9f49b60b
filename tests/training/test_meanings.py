"""Every flag is part of what a run is, a condition that is told when it changes, or free: and each is what it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from argonne.data import train_tokenizer
from argonne.launch import RestartFlags
from argonne.launch.config_file import ConfigFlags
from argonne.parallel import ArgonneError, Layout, ProcessGroups
from argonne.training.config import (
    DataFlags,
    ModelFlags,
    ParallelFlags,
    ResumeFlags,
    RunConfig,
    RunFlags,
    TrainingFlags,
)
from argonne.training.distill_config import DistillFlags
from argonne.training.run import conditions
from argonne.training.run.compilation import compiles
from argonne.training.run.conditions import MEANINGS, announced, changed_since
from argonne.training.run.directory import require_same
from argonne.training.run.identity import RunIdentity, differences
from argonne.training.run.reproducible import blocks_of
from argonne.training.run.setup import prepare
from argonne.training.tuning.config import ChatFlags, TuningFlags, TuningRunFlags
from tests.integration.runs import write_corpus

GROUPS = {
    "model": ModelFlags,
    "data": DataFlags,
    "training": TrainingFlags,
    "parallel": ParallelFlags,
    "launch": RestartFlags,
    "run": RunFlags,
}
# Told with the global batch, or in a test of its own.
ELSEWHERE = {"initial_batch_size", "gradient_accumulation_steps", "reproducible", "batch_size", "reset_optimizer"}
ELSEWHERE |= {
    "init_from",
    "resume_state",
    "rewarmup_steps",
    "checkpoint_path",
    "force_from_scratch",
    "reproducible_blocks",
}
ELSEWHERE |= {"max_position_embeddings", "dropout"}  # of Argonne 1.x: test_argonne1_run


def names(*kinds: type) -> list[str]:
    return [field.name for kind in kinds for field in dataclasses.fields(kind)]  # type: ignore[arg-type]


def test_every_flag_has_a_meaning_and_no_other_name_has_one() -> None:
    tuning = (ChatFlags, TuningFlags, TuningRunFlags)
    assert sorted(MEANINGS) == sorted({*names(*GROUPS.values(), *tuning, ResumeFlags, ConfigFlags, DistillFlags)})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    home = tmp_path_factory.mktemp("meanings")
    write_corpus(home / "corpus", documents=30)
    write_corpus(home / "other", documents=24, shards=2)
    for path in home.glob("*/*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.append_column("title", table["text"]), path)
    for name, texts in (("tokenizer", ["some words and more of them"] * 9), ("another", ["quite other text"] * 9)):
        train_tokenizer(texts).save_pretrained(home / name)
    return RunConfig(
        model=ModelFlags("demo", hidden_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=400),
        data=DataFlags((f"{home}/corpus/*.parquet",), block_size=16, tokenizer_path=home / "tokenizer"),
        training=TrainingFlags(precision="fp16", learning_rate=0.01),
        run=RunFlags(home / "run"),
    )


def other_values(base: RunConfig) -> dict[str, Any]:
    """Another legal value of each flag for which adding 1, or the other truth, is none."""
    home = base.run.output_dir.parent
    return {
        "preset": "argonne-2.0-2b",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 10,
        "intermediate_size": 64,
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": False,
        "initializer_range": 0.5,
        "family": "qwen3",
        "attention_bias": True,
        "hidden_size": 56,
        "num_hidden_layers": 3,
        "data_glob": (f"{home}/other/*.parquet",),
        "validation_glob": (f"{home}/other/*.parquet",),
        "eval": (f"other={home}/other/*.parquet",),
        "tokenizer_path": home / "another",
        "data_lanes": 3,
        "on_bad_shard": "skip",
        "cache_dir": home,
        "min_learning_rate": 1e-3,
        "learning_rate": 0.5,
        "precision": "fp64",
        "pipeline_schedule": "zb",
        "output_dir": home / "elsewhere",
        "stop_at_step": 3,
        "wall_time": 9.0,
        "trace": "1-3",
        "device": "cuda",
        "nproc": 1,
        "local_rank": 0,
        "pipeline_parallel": "auto",
        "tensor_parallel": 1,
        "text_column": "title",
        "filters": "none",
        "filter_max_digits": 0.4,
        "filter_min_readable": 0.2,
        "optimizer": "muon",
        "muon_momentum": 0.9,
        "muon_precision": "bf16",
        "adam_beta1": 0.8,
        "adam_beta2": 0.99,
        "adam_epsilon": 1e-6,
        "label_smoothing": 0.1,
        "z_loss": 1e-4,
        "schedule": "constant",
        "decay_shape": "sqrt",
        "recompute": "selective",
    }


def changed(base: RunConfig, group: str, name: str, value: Any) -> RunConfig:
    flags = replace(getattr(base, group), **{name: value})
    if name == "model_config":
        flags = replace(flags, preset=None)
    return replace(base, **{group: flags})


def told(config: RunConfig, device: str = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
    workload = prepare(config, ProcessGroups.single(device))
    return workload.identity.to_json(), workload.conditions


def test_each_flag_is_what_the_table_says(base: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One flag at a time: another value shows in the identity, in the conditions alone, or in neither."""
    home, values = base.run.output_dir.parent, other_values(base)
    (home / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4, "vocab_size": 500'
        ', "intermediate_size": 40, "rms_norm_eps": 1e-6, "num_key_value_heads": 2, "rope_theta": 10000.0}'
    )
    values["model_config"] = home / "config.json"
    with_held_out = changed(base, "data", "validation_glob", values["validation_glob"])
    with_decay = changed(base, "training", "schedule", "wsd")
    with_sets = changed(base, "data", "eval", values["eval"])
    special = {
        "validation_sequences": with_held_out,
        "eval_sequences": with_sets,
        **dict.fromkeys(("decay_steps", "decay_shape"), with_decay),
    }
    begun = {id(config): told(config) for config in (base, with_held_out, with_sets, with_decay)}
    for group, kind in GROUPS.items():
        for name in names(kind):
            if name in ELSEWHERE or name in ("device", "kernels", "streaming", "disable_compile"):
                continue  # those that no CPU changes are below; streaming is part of the data's own identity
            before = special.get(name, base)
            was = getattr(getattr(base, group), name)
            value = values[name] if name in values else (not was) if isinstance(was, bool) else (was or 0) + 1
            now = told(changed(before, group, name, value))
            identity, others = (differences(a, b) for a, b in zip(begun[id(before)], now, strict=True))
            meaning = "identity" if identity else "condition" if others else "free"
            assert meaning == MEANINGS[name], f"--{name}: {was!r} -> {value!r}: {identity} {others}"
    streaming = replace(base.data, streaming=False)
    assert differences(begun[id(base)][0], told(replace(base, data=streaming))[0]) == ["data.streaming: true -> false"]
    monkeypatch.setattr(conditions, "uses_triton", lambda backend, x: backend == "triton")
    triton = replace(base, training=replace(base.training, kernels="triton"))
    assert differences(begun[id(base)][1], told(triton)[1]) == ["kernels: torch -> triton"]
    flags = (base, prepare(base, ProcessGroups.single()).precision)
    compiled = [changed(base, "training", name, True) for name in ("compile", "disable_compile")]
    on_gpu = [compiles(c, Layout(), torch.device("cuda"), own_model=False) for c in (base, *compiled)]
    assert on_gpu == [True, True, False]
    on_meta = conditions.conditions_of(*flags, torch.device("meta"), ())
    assert differences(begun[id(base)][1], on_meta) == ["device: cpu -> meta"]
    assert not base.run.output_dir.exists(), "settling what a run is writes nothing"


def test_boundary_tokens_are_part_of_the_tokenizer(base: RunConfig, tmp_path: Path) -> None:
    """Two tokenizers with the same ids for every text, of which one begins documents with another token."""
    one, two = (train_tokenizer(["some words and more of them"] * 9) for _ in range(2))
    two.bos_token = "<mask>"
    found = []
    for name, tokenizer in (("one", one), ("two", two)):
        tokenizer.save_pretrained(tmp_path / name)
        data = replace(base.data, tokenizer_path=tmp_path / name, add_document_boundary_tokens=True)
        found.append(told(replace(base, data=data))[0])
    assert differences(*found) == ["tokenizer.boundary: [0, 2] -> [4, 2]"]


def older(config: RunConfig, told: tuple[dict[str, Any], dict[str, Any]], precision: str) -> dict[str, Any]:
    """What a version before this one kept."""
    identity = {name: value for name, value in told[0].items() if name not in ("precision", "initial_loss_scale")}
    identity["tokenizer"] = {name: told[0]["tokenizer"][name] for name in ("fingerprint", "size")}
    identity["data"] = {name: value for name, value in told[0]["data"].items() if name != "text_column"}
    since = ("schedule", "adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing", "z_loss")
    identity["schedule"] = {name: value for name, value in told[0]["schedule"].items() if name not in since}
    return {"identity": identity, "flags": {"training": {"precision": precision}}}


@pytest.mark.parametrize(("kept", "asked"), [("fp32", "bf16"), ("auto", "fp16"), ("fp64", "fp64"), ("bf16", "auto")])
def test_what_an_older_version_kept_is_the_same_run(base: RunConfig, kept: str, asked: str) -> None:
    config = changed(base, "training", "precision", asked)
    now = told(config)
    identity, conditions = RunIdentity.from_json(now[0]), now[1]
    saved = older(config, now, kept)
    assert changed_since(saved, identity, conditions, config) == []
    assert RunIdentity.of_saved(saved).differences(identity) == []


@pytest.mark.parametrize(
    ("group", "name", "value", "line"),
    [
        ("training", "optimizer", "muon", "schedule.optimizer: adamw -> muon"),
        ("training", "adam_beta1", 0.8, "schedule.adam_beta1: 0.9 -> 0.8"),
        ("training", "adam_beta2", 0.99, "schedule.adam_beta2: 0.95 -> 0.99"),
        ("training", "adam_epsilon", 1e-6, "schedule.adam_epsilon: 1e-08 -> 1e-06"),
        ("training", "label_smoothing", 0.1, "schedule.label_smoothing: 0.0 -> 0.1"),
        ("training", "z_loss", 1e-4, "schedule.z_loss: 0.0 -> 0.0001"),
        ("training", "schedule", "constant", "schedule.schedule: cosine -> constant"),
        ("data", "text_column", "title", "data.text_column: text -> title"),
        ("data", "filter_min_tokens", 11, "data.filters.min_tokens: 10 -> 11"),
    ],
)
def test_what_had_no_flag_was_as_a_flag_left_out(base: RunConfig, group: str, name: str, value: Any, line: str) -> None:
    """A run of an older version is another run with any other value: of the data, accepted on purpose only."""
    begun, config = told(base), changed(base, group, name, value)
    saved, now = RunIdentity.of_saved(older(base, begun, "fp16")), RunIdentity.from_json(told(config)[0])
    assert saved.differences(now) == [line]
    with pytest.raises(ArgonneError, match="holds a different run"):
        require_same(saved, now, Path("x"))
    if group == "data":
        assert require_same(saved, now, Path("x"), accept_data_change=True) == [line]


@pytest.mark.parametrize(
    ("kept", "asked", "flag"), [("fp64", "auto", "fp32"), ("fp64", "bf16", "fp32"), ("auto", "fp64", "fp64")]
)
def test_state_is_converted_only_where_the_command_names_the_precision(
    base: RunConfig, kept: str, asked: str, flag: str
) -> None:
    config = changed(base, "training", "precision", asked)
    now = told(config)
    identity, conditions = RunIdentity.from_json(now[0]), now[1]
    saved = older(config, now, kept)
    with pytest.raises(ArgonneError, match=rf"would be converted \(precision.state: .*--precision {flag} to convert"):
        changed_since(saved, identity, conditions, config)
    (line,) = changed_since(saved, identity, conditions, replace(config, given=frozenset({"precision"})))
    assert line.startswith("precision.state: ")
    assert announced([line, "data.shards: x", "seed: 1 -> 2"]) == [
        f"changed from here on: {line}",
        "changed from here on: seed: 1 -> 2",
    ]


def test_a_condition_that_was_not_kept_is_not_said_to_have_changed(base: RunConfig) -> None:
    identity, now = told(base)
    fewer: Callable[..., dict[str, Any]] = lambda *gone: {n: v for n, v in now.items() if n not in gone}  # noqa: E731
    saved = {"identity": identity, "conditions": {**fewer("kernels"), "torch": "2.0"}}
    assert changed_since(saved, RunIdentity.from_json(identity), now, base) == [f"torch: 2.0 -> {torch.__version__}"]


def test_a_reproducible_run_is_another_run_and_so_is_one_of_other_blocks_or_micro_batches(base: RunConfig) -> None:
    def identity(micro_batch: int = 16, **flags: Any) -> RunIdentity:
        config = replace(base, parallel=replace(base.parallel, **flags))
        config = changed(config, "training", "initial_batch_size", micro_batch)
        blocks = blocks_of(config)
        groups = ProcessGroups.single() if blocks is None else ProcessGroups.single().in_blocks(blocks)
        return prepare(config, groups).identity

    fast, kept = identity(), identity(reproducible=True)
    assert "reproducible" not in fast.to_json()
    assert kept.reproducible == {"blocks": 2, "micro_batch": 16}
    assert fast.differences(kept) == ['reproducible: null -> {"blocks": 2, "micro_batch": 16}']
    assert kept.differences(identity(reproducible=True, reproducible_blocks=1)) == ["reproducible.blocks: 2 -> 1"]
    assert kept.differences(identity(8, reproducible=True)) == ["reproducible.micro_batch: 16 -> 8"]
    assert fast.differences(identity(8)) == []
