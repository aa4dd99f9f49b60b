"""Bad input: one clear line, a non-zero exit within seconds, no hang, nothing lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.integration.runs import Finished, command, finish, run, start, succeed

BEFORE_LAUNCH = {
    "heads": ({"--num-attention-heads": 3, "--num-key-value-heads": 1}, "num_attention_heads=3 is not divisible by"),
    "glob": ({"--data-glob": "nowhere/*.parquet"}, "no data shards match nowhere/*.parquet"),
    "tokenizer": ({"--tokenizer-path": "nowhere"}, "tokenizer_path='nowhere' does not exist"),
    "world size": ({"--tensor-parallel": 4}, "world size 2 does not match the layout tensor=4"),
    "preset": ({"--preset": "gpt-9"}, "preset='gpt-9' is not known; legal: demo, argonne-2.0-4.9b"),
    "unknown flag": ({"--frobnicate": 1}, "--frobnicate"),
    "no number": ({"--total-steps": "many"}, "--total-steps"),
    "no steps": ({"--total-steps": 0}, "total_steps=0 is not legal; legal: 1 or more"),
    "sample tokens": ({"--sample-tokens": -1}, "sample_tokens=-1 is not legal; legal: 0 or more"),
    "empty glob": ({"--data-glob": ""}, "data_glob='' is empty"),
    "conflict": ({"--model-config": "x.json"}, "preset='demo' conflicts with model_config='x.json'"),
    "negative width": ({"--intermediate-size": -8}, "intermediate_size=-8 is not legal"),
    "sequence": ({"--sequence-parallel": None, "--block-size": 31}, "block_size=31 is not divisible by"),
    "kernels": ({"--kernels": "triton", "--device": "cpu"}, "kernels='triton' needs a GPU, but the device is cpu"),
    "output file": ({"--output-dir": "/dev/null/x"}, "output_dir='/dev/null/x' cannot be made"),
}

IRREPRODUCIBLE = {
    "context": (
        {"--context-parallel": 2},
        "context_parallel=2 is not reproducible: gradients of keys and values are summed over its processes in another "
        "order; legal with --reproducible: 1",
    ),
    "uneven": ({"--uneven-shards": None}, "uneven_shards=True conflicts with reproducible=True"),
    "hybrid": (
        {"--data-parallel": 2, "--fsdp": None, "--fsdp-shard": 2},
        "fsdp_shard=2 is not reproducible: its groups are summed in another order",
    ),
    "no blocks": ({"--reproducible-blocks": 0}, "reproducible_blocks=0 is not legal; legal: 1 or more"),
    "blocks": (
        {"--reproducible-blocks": 3},
        "intermediate_size = 40 is not cut into reproducible_blocks=3 equal blocks",
    ),
    "no subtree": (
        {"--num-attention-heads": 6, "--num-key-value-heads": 6, "--intermediate-size": 48},
        "tensor_parallel=2 does not give each process a subtree of the 6 blocks of a reproducible run, and whole "
        "key-value heads (6 in all); legal sizes: 1, 3, 6",
    ),
    "tokens": (
        {"--initial-batch-size": 1, "--block-size": 31},
        "initial_batch_size x block_size = 31 tokens are not 2 equal blocks of a reproducible sum",
    ),
}
"""What ``--reproducible`` refuses."""

BEFORE_LAUNCH |= {
    "blocks of no tree": ({"--reproducible-blocks": 2}, "reproducible_blocks=2 has no effect without --reproducible"),
    **{
        f"reproducible, {name}": ({"--reproducible": None, **bad}, expected)
        for name, (bad, expected) in IRREPRODUCIBLE.items()
    },
}


def assert_refused(done: Finished, expected: str) -> None:
    assert done.status not in (0, -9), done.output
    lines = [line for line in done.output.splitlines() if line.startswith("argonne: error: ")]
    assert len(lines) == 1, done.output
    assert expected in lines[0]
    assert done.seconds < 30


@pytest.mark.parametrize("name", BEFORE_LAUNCH)
def test_what_no_run_could_use_is_refused_before_any_rank_starts(
    flags: dict[str, Any], tmp_path: Path, name: str
) -> None:
    bad, expected = BEFORE_LAUNCH[name]
    done = run("pretrain", {**flags, "--output-dir": tmp_path / "run", **bad})
    assert_refused(done, expected)
    assert len(done.output.splitlines()) == 1, done.output
    assert not (tmp_path / "run").exists()


def test_missing_default_data_is_refused(flags: dict[str, Any], tmp_path: Path) -> None:
    without = {name: value for name, value in flags.items() if name != "--data-glob"}
    assert_refused(run("pretrain", {**without, "--output-dir": tmp_path}), "../data/CC-MAIN-2025-26/*.parquet")


def test_a_shard_that_is_not_parquet_is_refused(flags: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_text("not a table")
    done = run("pretrain", {**flags, "--data-glob": tmp_path / "*.parquet", "--output-dir": tmp_path / "run"})
    assert_refused(done, "broken.parquet")


def test_a_shard_without_text_is_refused_naming_its_columns(flags: dict[str, Any], tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "url": ["b"]}), tmp_path / "other.parquet")
    done = run("pretrain", {**flags, "--data-glob": tmp_path / "*.parquet", "--output-dir": tmp_path / "run"})
    assert_refused(done, "its columns: body (string), url (string)")


def test_a_block_size_beyond_the_data_is_refused(flags: dict[str, Any], tmp_path: Path) -> None:
    done = run("pretrain", {**flags, "--block-size": 1_000_000, "--output-dir": tmp_path})
    assert_refused(done, "block_size=1000000")


def test_a_directory_of_a_different_run_is_refused_naming_what_differs(
    flags: dict[str, Any], uninterrupted: Path
) -> None:
    before = sorted(path.name for path in uninterrupted.iterdir())
    done = run("pretrain", {**flags, "--learning-rate": 1e-3, "--seed": 5, "--output-dir": uninterrupted})
    assert_refused(done, "holds a different run (schedule.learning_rate: 0.003 -> 0.001; seed: 0 -> 5)")
    assert sorted(path.name for path in uninterrupted.iterdir()) == before


def test_a_resume_into_the_directory_of_another_run_is_refused(
    flags: dict[str, Any], uninterrupted: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text('{"identity": {}, "global_batch": 1, "first_layout": {}}')
    done = run("resume", {"--checkpoint-path": uninterrupted / "step_00000004", "--output-dir": tmp_path})
    assert_refused(done, "holds a different run")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_global_batch_other_than_the_runs_is_refused(flags: dict[str, Any], uninterrupted: Path) -> None:
    done = run("pretrain", {**flags, "--output-dir": uninterrupted, "--gradient-accumulation-steps": 3})
    assert_refused(done, "global batch 6 (initial_batch_size=2 x gradient_accumulation_steps=3 x data_parallel=1)")


def test_a_run_that_diverges_stops_in_one_line_before_the_step_is_taken(flags: dict[str, Any], tmp_path: Path) -> None:
    wild = {"--learning-rate": 1e30, "--warmup-steps": 0, "--output-dir": tmp_path}
    done = run("pretrain", {**flags, **wild})
    assert_refused(done, "the step was not taken. Continue from the last checkpoint with a lower --learning-rate")
    assert "Traceback" not in done.output


@pytest.mark.parametrize("kind", [{}, {"--zero1": None}])
def test_replicas_whose_micro_batches_are_no_branch_are_refused(
    flags: dict[str, Any], tmp_path: Path, kind: dict[str, Any]
) -> None:
    shared = {"--reproducible": None, "--data-parallel": 2, "--gradient-accumulation-steps": 3, **kind}
    done = run("pretrain", {**flags, **shared, "--output-dir": tmp_path})
    name = "zero1" if kind else "replicate"
    assert_refused(
        done, f"gradient_accumulation_steps=3 is not reproducible as {name}: a sum over 3 micro-batches is no"
    )
    assert done.output.rstrip().endswith("legal data_parallel sizes: 1, 3, 6")


def test_more_threads_than_one_are_refused_by_one_rank(flags: dict[str, Any], tmp_path: Path) -> None:
    words = {**flags, "--reproducible": None, "--output-dir": tmp_path / "run"}
    done = run("pretrain", words, OMP_NUM_THREADS="2")
    assert_refused(done, "OMP_NUM_THREADS=2 conflicts with reproducible=True")
    assert done.status == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_directory_whose_every_checkpoint_is_damaged_is_refused_and_left_alone(
    flags: dict[str, Any], tmp_path: Path
) -> None:
    succeed("pretrain", {**flags, "--output-dir": tmp_path, "--stop-at-step": 4})
    (tmp_path / "step_00000004" / "config.json").write_text("{}")
    lines = (tmp_path / "metrics.jsonl").read_text()
    done = run("pretrain", {**flags, "--output-dir": tmp_path})
    assert_refused(done, "none of the 1 checkpoints in output_dir=")
    assert (tmp_path / "metrics.jsonl").read_text() == lines


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc' is not legal; legal: 1 or more"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK='2' is not legal; legal: 0 to 1"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "0"},
            "rank 1: MASTER_PORT='0' is not legal; legal: 1 to 65535",
        ),
        ({"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS='many' is not legal"),
    ],
)
def test_what_no_launcher_says_is_refused_by_the_process_that_is_told_so(
    flags: dict[str, Any], tmp_path: Path, variables: dict[str, str], expected: str
) -> None:
    done = finish(start(command("pretrain", {**flags, "--output-dir": tmp_path / "run"}), **variables))
    assert_refused(done, expected)
    assert done.status == 2
    assert not (tmp_path / "run").exists()


def test_under_torchrun_one_rank_refuses_for_all(flags: dict[str, Any], tmp_path: Path) -> None:
    done = run("pretrain", {**flags, "--data-glob": "nowhere/*", "--output-dir": tmp_path}, torchrun=True)
    assert_refused(done, "no data shards match nowhere/*")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("nowhere", "checkpoint path 'nowhere' does not exist"),
        (".", "holds no checkpoint"),
        (None, "--checkpoint-path"),
    ],
)
def test_a_checkpoint_path_that_holds_none_is_refused(path: str | None, expected: str) -> None:
    assert_refused(run("resume", {"--checkpoint-path": path} if path else {}), expected)
