"""The flags of a run as JSON: there and back, by their types, from this version and from those before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.checkpoint import CheckpointError
from argonne.launch import RestartFlags
from argonne.parallel import ArgonneError
from argonne.training.config import DataFlags, ModelFlags, RunConfig, RunFlags, TrainingFlags
from argonne.training.layout_flags import ParallelFlags
from argonne.training.run.flags_json import flags_from_json, flags_to_json, saved_flags

PATHS = st.from_regex(r"(/[a-z]{1,5}){1,3}", fullmatch=True).map(Path)

CONFIGS = st.builds(
    RunConfig,
    model=st.builds(
        ModelFlags,
        model_config=st.none() | PATHS,
        hidden_size=st.none() | st.integers(1, 999),
        rope_theta=st.none() | st.floats(1, 1e6),
        tie_word_embeddings=st.none() | st.booleans(),
    ),
    data=st.builds(
        DataFlags,
        data_glob=st.none() | st.lists(PATHS.map(lambda path: f"{path}/*.parquet"), max_size=3).map(tuple),
        tokenizer_path=st.none() | PATHS,
        data_lanes=st.none() | st.integers(1, 64),
        streaming=st.booleans(),
    ),
    training=st.builds(TrainingFlags, learning_rate=st.floats(1e-9, 1), precision=st.sampled_from(["auto", "bf16"])),
    parallel=st.builds(
        ParallelFlags,
        tensor_parallel=st.none() | st.integers(1, 8),
        pipeline_parallel=st.sampled_from(["auto", 1, 4]),
        fsdp=st.booleans(),
    ),
    launch=st.builds(
        RestartFlags,
        device=st.sampled_from(["auto", "cpu", "cuda"]),
        nproc=st.none() | st.integers(1, 8),
        local_rank=st.none() | st.integers(0, 7),
        max_restarts=st.integers(0, 9),
    ),
    run=st.builds(RunFlags, output_dir=PATHS, wall_time=st.none() | st.floats(0, 1e9)),
)


@given(CONFIGS)
def test_flags_round_trip_through_json(config: RunConfig) -> None:
    assert flags_from_json(json.loads(json.dumps(flags_to_json(config)))) == config


def test_paths_are_saved_so_that_they_hold_from_any_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    data = DataFlags(data_glob=("a/*.parquet",), eval=("one=b", "two=/c=d"), tokenizer_path=Path("t"))
    config = RunConfig(data=data, run=RunFlags(Path("o")))
    saved = flags_from_json(flags_to_json(config))
    assert saved.data.data_glob == (f"{tmp_path}/a/*.parquet",)
    assert saved.data.eval == (f"one={tmp_path}/b", "two=/c=d")
    assert saved.data.tokenizer_path == tmp_path / "t"
    assert saved.run.output_dir == tmp_path / "o"


def test_flags_of_another_version_are_left_out_and_missing_ones_take_their_default() -> None:
    saved = flags_to_json(RunConfig())
    saved["training"]["flag_of_the_future"] = 3
    saved["group_of_the_future"] = {}
    del saved["training"]["seed"], saved["run"]
    assert flags_from_json(saved) == RunConfig()


def test_the_flags_of_launching_that_an_earlier_version_kept_with_the_layout_are_read_from_there() -> None:
    config = RunConfig(parallel=ParallelFlags(tensor_parallel=2), launch=RestartFlags("cpu", 4, 1, 3))
    saved = flags_to_json(config)
    saved["parallel"] |= saved.pop("launch")
    found = flags_from_json(json.loads(json.dumps(saved)))
    assert (found.parallel, found.launch) == (config.parallel, config.launch)


def test_a_whole_number_in_the_place_of_any_number_is_one() -> None:
    saved = flags_to_json(RunConfig())
    saved["training"]["learning_rate"] = 1
    found = flags_from_json(saved).training.learning_rate
    assert (found, type(found)) == (1.0, float)


def test_what_was_a_truth_in_an_earlier_version_is_a_word_now() -> None:
    saved = flags_to_json(RunConfig())
    for before, now in ((True, "default"), (False, "none")):
        saved["data"]["filters"] = before
        assert flags_from_json(saved).data.filters == now


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("training", "total_steps", "12"),
        ("training", "total_steps", 1.5),
        ("training", "total_steps", True),
        ("training", "precision", "fp7"),
        ("training", "learning_rate", None),
        ("data", "streaming", 1),
        ("data", "data_glob", "a.parquet"),
        ("data", "data_glob", [3]),
        ("data", "tokenizer_path", ["t"]),
        ("run", "output_dir", 3),
        ("parallel", "pipeline_parallel", "all"),
        ("launch", "nproc", "2"),
    ],
)
def test_a_value_of_another_type_is_refused_by_the_name_of_its_flag(group: str, name: str, value: Any) -> None:
    saved = flags_to_json(RunConfig())
    saved[group][name] = value
    with pytest.raises(ArgonneError) as refusal:
        flags_from_json(saved)
    assert str(refusal.value) == f"{name}={value!r} is of another type than the flag"


def test_a_checkpoint_tells_the_flags_of_its_run(tmp_path: Path) -> None:
    config = RunConfig(data=DataFlags(block_size=64, data_glob=("/a*.parquet",)), run=RunFlags(Path("/o")))
    (tmp_path / "trainer.json").write_text(json.dumps({"flags": flags_to_json(config)}))
    assert saved_flags(tmp_path) == config


@pytest.mark.parametrize("content", [None, "{", "{}", '{"flags": 3}', '{"flags": null}', "[]"])
def test_a_checkpoint_without_flags_is_refused_by_its_file(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "trainer.json").write_text(content)
    with pytest.raises(CheckpointError, match="trainer.json' does not tell the run's flags"):
        saved_flags(tmp_path)
