"""What a run is: kept as JSON, read from every version's, and compared entry by entry."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from argonne.models import preset
from argonne.parallel import ArgonneError, Precision
from argonne.training.config import RunConfig, RunFlags, TrainingFlags
from argonne.training.layout_flags import ParallelFlags
from argonne.training.run.directory import require_same
from argonne.training.run.identity import RunIdentity, differences

FP32, FP16, FP64 = (
    Precision(torch.float32, torch.float32),
    Precision(torch.float32, torch.float16),
    Precision(torch.float64, torch.float64),
)
DATA = {
    "fingerprint": "abc",
    "shards": [[{"name": "a.parquet", "size": 9, "rows": [[7, 1]]}]],
    "filters": 1,
    "lanes": 4,
    "streaming": True,
    "block_size": 32,
    "document_boundary_tokens": True,
    "document_mask": False,
}


def whole(precision: Precision = FP32, **training: Any) -> RunIdentity:
    """The identity of a run whose tokenizer is known."""
    config = RunConfig(training=TrainingFlags(**training))
    tokenizer = {"fingerprint": "t", "size": 300, "boundary": [0, 2]}
    settled = RunIdentity.of(config, DATA, precision)
    return dataclasses.replace(settled, model=asdict(preset("demo")), tokenizer=tokenizer)


def schedule_of(config: RunConfig) -> dict[str, Any]:
    return dict(RunIdentity.of(config, {}, FP32).schedule or {})


def test_the_json_has_the_entries_in_the_order_in_which_runs_have_always_kept_them() -> None:
    expected = {
        "data": DATA,
        "seed": 5,
        "schedule": {
            "total_steps": 12,
            "learning_rate": 0.5,
            "min_learning_rate": 1e-5,
            "warmup_steps": 2000,
            "weight_decay": 0.1,
            "gradient_clip": 1.0,
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "adam_epsilon": 1e-8,
            "label_smoothing": 0.0,
            "z_loss": 0.0,
            "schedule": "cosine",
            "optimizer": "adamw",
            "muon_momentum": 0.95,
            "muon_precision": "auto",
        },
        "precision": {"state": "float32"},
        "initial_loss_scale": 65536.0,
        "model": dataclasses.asdict(preset("demo")),
        "tokenizer": {"fingerprint": "t", "size": 300, "boundary": [0, 2]},
    }
    found = whole(FP16, seed=5, total_steps=12, learning_rate=0.5).to_json()
    assert json.dumps(found) == json.dumps(expected), "the order of the entries is part of the file too"
    assert "initial_loss_scale" not in whole(FP32).to_json()


def test_an_identity_round_trips_through_json() -> None:
    for identity in (whole(), whole(FP16), whole(FP64), RunIdentity(), RunIdentity(seed=3)):
        again = RunIdentity.from_json(json.loads(json.dumps(identity.to_json())))
        assert again == identity
        assert again.differences(identity) == []


ENTRIES = st.dictionaries(
    st.sampled_from(["model", "schedule", "tokenizer", "precision"]),
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
)
LATER = st.dictionaries(st.sampled_from(["later", "newer"]), st.integers())


@given(ENTRIES, st.integers(), LATER)
def test_what_another_version_keeps_is_kept_and_compared(
    groups: dict[str, Any], seed: int, later: dict[str, int]
) -> None:
    saved = {**groups, "seed": seed, **later}
    identity = RunIdentity.from_json(saved)
    assert identity.to_json() == saved
    lines = identity.differences(replace(identity, others={}))
    assert [line.split(":")[0] for line in lines] == sorted(later)


@pytest.mark.parametrize(
    ("saved", "what"),
    [
        ("it", "identity"),
        (None, "identity"),
        ({"data": []}, "identity.data"),
        ({"model": 3}, "identity.model"),
        ({"tokenizer": None}, "identity.tokenizer"),
        ({"schedule": "x"}, "identity.schedule"),
        ({"data": {"shards": {"a": 3}}}, "identity.data.shards"),
        ({"data": {"shards": [3]}}, "identity.data.shards"),
        ({"data": {"lanes": "4"}}, "identity.data.lanes"),
        ({"data": {"lanes": -4}}, "identity.data.lanes"),
    ],
)
def test_what_is_of_another_kind_is_named(saved: Any, what: str) -> None:
    with pytest.raises(ValueError, match=f"^its {what} is of another kind$"):
        RunIdentity.from_json(saved)


@pytest.mark.parametrize(("name", "state"), [("fp64", "float64"), ("auto", "float32"), ("bf16", "float32")])
def test_of_an_older_run_the_flags_give_the_precision(name: str, state: str) -> None:
    older = {"identity": {"seed": 1}, "flags": {"training": {"precision": name}}}
    assert RunIdentity.of_saved(older) == RunIdentity(seed=1, precision={"state": state})
    assert RunIdentity.of_saved({"identity": {"seed": 1}}) == RunIdentity(seed=1)
    newer = {"identity": {"precision": {"state": "float64"}}, "flags": {"training": {"precision": "bf16"}}}
    assert RunIdentity.of_saved(newer).state_dtype == "float64"


@pytest.mark.parametrize("flags", [None, [], "x", {"training": []}, {"training": None}, {}])
def test_flags_that_are_none_give_no_precision(flags: Any) -> None:
    assert RunIdentity.of_saved({"identity": {"seed": 1}, "flags": flags}) == RunIdentity(seed=1)


def test_what_an_older_version_did_not_keep_is_no_difference() -> None:
    now = whole(FP16)
    older = now.to_json()
    del older["precision"], older["initial_loss_scale"], older["tokenizer"]
    older["tokenizer"] = {"fingerprint": "t", "size": 300}
    before = RunIdentity.from_json(older)
    assert before.differences(now) == now.differences(before) == []
    assert before.differences(replace(now, seed=9)) == ["seed: 0 -> 9"]


def test_differences_are_looked_for_in_the_parts_that_are_asked_for() -> None:
    before, now = whole(), replace(whole(FP64, learning_rate=0.5), seed=7)
    assert before.differences(now, ["seed"]) == ["seed: 0 -> 7"]
    assert before.differences(now, ["model", "data"]) == []
    assert before.differences(now) == [
        "precision.state: float32 -> float64",
        "schedule.learning_rate: 0.0001 -> 0.5",
        "seed: 0 -> 7",
    ]


def test_what_the_data_and_the_tokenizer_settle_is_asked_by_name() -> None:
    identity = whole()
    assert (identity.shards, identity.lanes, identity.is_streamed) == (DATA["shards"], 4, True)
    assert (identity.fingerprint, identity.tokens, identity.state_dtype) == ("t", ("t", None, 1), "float32")
    nothing = RunIdentity()
    assert (nothing.shards, nothing.lanes, nothing.is_streamed, nothing.fingerprint) == ([], None, None, None)


IDENTITIES = st.recursive(
    st.integers(0, 9) | st.text(max_size=4),
    lambda inner: st.dictionaries(st.sampled_from(["model", "data", "seed"]), inner, min_size=1, max_size=3),
    max_leaves=8,
).filter(lambda found: isinstance(found, dict))


def leaves(identity: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in identity.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


@given(IDENTITIES, st.data())
def test_one_entry_that_differs_is_the_one_that_is_named(identity: dict[str, Any], data: st.DataObject) -> None:
    changed = data.draw(st.sampled_from(sorted(leaves(identity))))
    other = json.loads(json.dumps(identity))
    *groups, name = changed.split(".")
    inner = other
    for group in groups:
        inner = inner[group]
    inner[name] = -1
    assert differences(identity, json.loads(json.dumps(identity))) == []
    assert [line.split(":")[0] for line in differences(identity, other)] == [changed]
    assert [line.split(":")[0] for line in differences(other, identity)] == [changed]


def test_differences_name_the_entry_and_both_values() -> None:
    saved = {"model": {"hidden_size": 64, "vocab_size": 9}, "seed": 1, "data": ["a"], "tokenizer": "x" * 100}
    wanted = {"model": {"hidden_size": 32, "vocab_size": 9}, "seed": 1, "data": ["a", "b"], "global_batch": 8}
    assert differences(saved, wanted) == [
        'data: ["a"] -> ["a", "b"]',
        "global_batch: null -> 8",
        "model.hidden_size: 64 -> 32",
        f"tokenizer: {'x' * 24}...{'x' * 12} -> null",
    ]


def test_a_different_run_is_refused_naming_what_differs(tmp_path: Path) -> None:
    assert require_same(RunIdentity(seed=1), RunIdentity(seed=1), tmp_path) == []
    with pytest.raises(ArgonneError) as refusal:
        require_same(RunIdentity(seed=1, others={"steps": 2}), RunIdentity(seed=3, others={"steps": 4}), tmp_path)
    assert str(refusal.value) == (
        f"output_dir={str(tmp_path)!r} holds a different run (seed: 1 -> 3; steps: 2 -> 4); "
        "legal: the run's own flags, or another --output-dir"
    )


def test_the_layout_and_where_to_save_are_no_part_of_the_schedule() -> None:
    plain = RunConfig()
    moved = RunConfig(parallel=ParallelFlags(tensor_parallel=4), run=RunFlags(save_interval=1, stop_at_step=3))
    assert schedule_of(moved) == schedule_of(plain)
    for name in ("total_steps", "learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "gradient_clip"):
        other = schedule_of(replace(plain, training=replace(plain.training, **{name: 7})))
        assert [line.split(":")[0] for line in differences(schedule_of(plain), other)] == [name]
