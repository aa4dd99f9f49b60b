"""Whole runs in float64 over every axis: the same losses, batches and checkpoints as one process, across restarts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.integration.runs import metrics, run, succeed

pytestmark = pytest.mark.slow

DEEPER = {"--num-hidden-layers": 5, "--gradient-accumulation-steps": 4, "--precision": "fp64", "--data-lanes": 8}
ZB = {"--pipeline-parallel": 2, "--pipeline-schedule": "zb"}
INTERLEAVED = {"--pipeline-parallel": 2, "--pipeline-schedule": "interleaved"}
COMPRESSION = {"jsonl": None, "jsonl.gz": "gzip", "jsonl.zst": "zstd"}
FSDP = {"--fsdp": None}
SEQUENCE = {"--tensor-parallel": 2, "--sequence-parallel": None}

Layouts = list[tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def texts(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus in shards of one row group, as Parquet and as JSON lines."""
    folder = tmp_path_factory.mktemp("texts")
    for path, suffix in zip(sorted(corpus.glob("*.parquet")), ("jsonl", "jsonl.gz", "jsonl.zst"), strict=True):
        table = pq.read_table(path)
        pq.write_table(table, folder / path.name)
        lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
        with pa.output_stream(folder / f"{path.stem}.{suffix}", compression=COMPRESSION[suffix]) as file:
            file.write(lines.encode())
    return folder


@pytest.fixture(scope="module")
def deeper(flags: dict[str, Any], texts: Path) -> dict[str, Any]:
    return {**flags, **DEEPER, "--data-glob": texts / "*.parquet"}


@pytest.fixture(scope="module")
def alone(deeper: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of the run in one process."""
    directory = tmp_path_factory.mktemp("alone")
    succeed("pretrain", {**deeper, "--output-dir": directory}, nproc=1)
    return metrics(directory)


def moved(deeper: dict[str, Any], directory: Path, layouts: Layouts) -> list[dict[str, Any]]:
    """The metrics of a run that stops every few steps and goes on in the next layout."""
    for number, (nproc, layout) in enumerate(layouts, 1):
        stop = {"--stop-at-step": 12 * number // len(layouts)}
        succeed("pretrain", {**deeper, **layout, **stop, "--output-dir": directory}, nproc=nproc)
    return metrics(directory)


def assert_same_run(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, wanted in zip(found, expected, strict=True):
        where = f"step {line['step']} with {line['layout']}"
        assert line["batch_hash"] == wanted["batch_hash"], where
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-9), where
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-8), where
        assert line["learning_rate"] == wanted["learning_rate"], where
        assert line["tokens"] == wanted["tokens"], where


def test_a_run_moves_from_pipeline_to_context_to_sequence_parallelism(
    deeper: dict[str, Any], alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    layouts: Layouts = [(2, ZB), (2, {"--context-parallel": 2}), (2, SEQUENCE)]
    found = moved(deeper, tmp_path, layouts)
    assert_same_run(found, alone)
    # At first every one of the 12,000 tokens is about as likely as any other.
    assert alone[0]["loss"] == pytest.approx(math.log(12_000), rel=0.02)
    assert [line["layout"]["pipeline"] for line in found] == [2] * 4 + [1] * 8
    assert [line["layout"]["context"] for line in found] == [1] * 4 + [2] * 4 + [1] * 4


@pytest.mark.slow
def test_global_batches_are_the_same_over_1_2_4_and_1_replicas(
    deeper: dict[str, Any], alone: list[dict[str, Any]], texts: Path, tmp_path: Path
) -> None:
    """Of JSON lines, plain and compressed; and those of the same corpus in Parquet."""
    layouts: Layouts = [(n, {"--data-parallel": n}) for n in (1, 2, 4, 1)]
    found = moved({**deeper, "--data-glob": texts / "*.jsonl*"}, tmp_path, layouts)
    assert_same_run(found, alone)
    assert [line["layout"]["data"] for line in found] == [1] * 3 + [2] * 3 + [4] * 3 + [1] * 3


@pytest.mark.exhaustive
def test_replicas_whose_number_does_not_divide_the_lanes_have_the_same_global_batches(
    deeper: dict[str, Any], tmp_path: Path
) -> None:
    dozen = {**deeper, "--gradient-accumulation-steps": 6}
    succeed("pretrain", {**dozen, "--output-dir": tmp_path / "alone"}, nproc=1)
    directory = tmp_path / "moved"
    first = {**dozen, "--data-parallel": 2, "--gradient-accumulation-steps": 3, "--stop-at-step": 4}
    assert "does not divide" not in succeed("pretrain", {**first, "--output-dir": directory})
    third = {**dozen, "--data-parallel": 3, "--gradient-accumulation-steps": 2}
    told = succeed("pretrain", {**third, "--output-dir": directory}, nproc=3)
    assert "data_parallel=3 does not divide the 8 lanes: each is tokenised by 3 ranks" in told
    assert_same_run(metrics(directory), metrics(tmp_path / "alone"))


def test_without_a_launcher_auto_gives_the_pipeline_every_process(deeper: dict[str, Any], tmp_path: Path) -> None:
    flags = {**deeper, "--pipeline-parallel": "auto", "--output-dir": tmp_path, "--stop-at-step": 1}
    told = succeed("pretrain", flags, nproc=3)
    assert "pipeline=3 on cpu" in told
    assert "1f1b in 3 stages, bubble " in told
    assert metrics(tmp_path)[0]["layout"]["pipeline"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts",
    [
        [(4, {**INTERLEAVED, "--tensor-parallel": 2}), (4, {"--data-parallel": 2, "--context-parallel": 2, **FSDP})],
        pytest.param(
            [(4, {"--pipeline-parallel": 4}), (8, {"--data-parallel": 2, **SEQUENCE, "--context-parallel": 2})],
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=str,
)
def test_any_layout_goes_on_where_another_stopped(
    deeper: dict[str, Any], alone: list[dict[str, Any]], tmp_path: Path, layouts: Layouts
) -> None:
    assert_same_run(moved(deeper, tmp_path, layouts), alone)


@pytest.mark.slow
def test_float16_skips_the_same_steps_in_every_layout_and_goes_on_exactly(
    deeper: dict[str, Any], tmp_path: Path
) -> None:
    """A scale so large that the first gradients overflow."""
    half = {**deeper, "--precision": "fp16", "--initial-loss-scale": 2.0**22}
    layout = {"--pipeline-parallel": 2, "--context-parallel": 2, "--zero1": None}
    succeed("pretrain", {**half, "--output-dir": tmp_path / "alone"}, nproc=1)
    succeed("pretrain", {**half, **layout, "--output-dir": tmp_path / "shared", "--stop-at-step": 6}, nproc=4)
    stopped = metrics(tmp_path / "shared")
    succeed("pretrain", {**half, **layout, "--output-dir": tmp_path / "shared"}, nproc=4)
    alone, found = metrics(tmp_path / "alone"), metrics(tmp_path / "shared")
    assert found[:6] == stopped
    assert [line["grad_norm"] is None for line in found] == [line["grad_norm"] is None for line in alone]
    assert found[0]["grad_norm"] is None, "the scale was meant to overflow"
    assert sum(line["grad_norm"] is not None for line in found) >= 6
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in alone], rel=1e-3)


@pytest.mark.parametrize(
    ("nproc", "layout", "words"),
    [
        (2, {"--pipeline-parallel": 2, "--num-hidden-layers": 1}, "num_hidden_layers=1 is less than the 2 stages"),
        (2, {**ZB, "--num-hidden-layers": 3}, "legal pipeline_parallel: 1"),
        (2, {"--pipeline-parallel": 2, "--gradient-accumulation-steps": 1}, "gradient_accumulation_steps=1 is less"),
        (2, {**INTERLEAVED, "--gradient-accumulation-steps": 5}, "legal: a multiple of 2 (4 or 6)"),
        (2, {**INTERLEAVED, "--pipeline-interleave": 1}, "pipeline_interleave=1 is not legal"),
        (2, {"--context-parallel": 2, "--block-size": 30}, "block_size=30 cannot be shared out"),
        (2, {"--context-parallel": 3}, "world size 2 does not match the layout"),
        (2, {"--pipeline-parallel": 0}, "pipeline_parallel=0 is not a number of processes; legal: 1 or more"),
        (2, {"--pipeline-parallel": "all"}, "pipeline-parallel"),
        (2, {**ZB, "--fsdp": None, "--data-parallel": 1}, "fsdp=True does not go with pipeline_schedule='zb'"),
        (2, {"--data-parallel": 2, "--fsdp": None, "--zero1": None}, "fsdp=True conflicts with zero1=True"),
        (1, {"--precision": "fp16", "--initial-loss-scale": 0}, "initial_loss_scale=0.0 is not legal"),
        (4, {**SEQUENCE, "--context-parallel": 2, "--block-size": 12, "--tensor-parallel": 4}, "world size 4"),
    ],
    ids=str,
)
def test_a_layout_that_cannot_be_is_refused_in_one_line(
    deeper: dict[str, Any], tmp_path: Path, nproc: int, layout: dict[str, Any], words: str
) -> None:
    done = run("pretrain", {**deeper, **layout, "--output-dir": tmp_path / "run"}, nproc=nproc)
    assert done.status == 2, done.output
    assert len(done.output.splitlines()) == 1, done.output
    assert words in done.output, done.output
    assert not (tmp_path / "run").exists()


def test_documents_apart_and_corpora_mixed_by_weight_are_the_same_run_in_every_layout(
    deeper: dict[str, Any], corpus: Path, texts: Path, tmp_path: Path
) -> None:
    mixed = [f"{corpus}/part-0.parquet:0.7", f"{corpus}/part-[12].parquet:0.3"]
    packed = {**deeper, "--data-glob": mixed, "--document-mask": None, "--validation-glob": corpus / "part-1.parquet"}
    packed |= {
        "--eval": [f"web={corpus}/part-2.parquet", f"lines={texts}/part-1.jsonl.gz"],
        "--eval-interval": 3,
        "--eval-sequences": 4,
    }
    succeed("pretrain", {**packed, "--output-dir": tmp_path / "alone"}, nproc=1)
    expected = metrics(tmp_path / "alone")
    layouts: Layouts = [(2, ZB), (2, {"--context-parallel": 2}), (4, {**SEQUENCE, "--data-parallel": 2})]
    found = moved(packed, tmp_path / "moved", layouts)
    assert_same_run(found, expected)
    for line, wanted in zip(found, expected, strict=True):
        assert (line["validation_loss"] is None) == (wanted["validation_loss"] is None)
        if line["validation_loss"] is not None:
            assert line["validation_loss"] == pytest.approx(wanted["validation_loss"], rel=1e-9)
        # The named sets are measured at their own interval and at the end, not where a layout stopped.
        assert (line["eval"] is not None) == (wanted["eval"] is not None) == (line["step"] % 3 == 0)
        for name, measured in (wanted["eval"] or {}).items():
            assert line["eval"][name] == pytest.approx(measured, rel=1e-9)
    without = {name: value for name, value in packed.items() if name != "--document-mask"}
    done = run("pretrain", {**without, "--output-dir": tmp_path / "alone"}, nproc=1)
    assert "document_mask: true -> false" in done.output
    done = run("pretrain", {**packed, "--data-glob": mixed[::-1], "--output-dir": tmp_path / "alone"}, nproc=1)
    assert done.status != 0
    assert "data." in done.output
