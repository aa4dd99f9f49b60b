"""The benchmark of the collectives, run for real at sizes that take no time; and its refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.models import preset
from argonne.parallel import ArgonneError
from benchmarks.collective_timing import OPERATIONS
from benchmarks.memory import Need, parse_size, require_memory, size_text
from benchmarks.overlap import hidden_fraction, overlap_bytes
from benchmarks.symmetric_memory import VARIANTS
from benchmarks.tp_allreduce import Flags, resolve

ROOT = Path(__file__).parents[2]
TINY = {
    "--max-bytes": "16K",
    "--iterations": 4,
    "--warmup": 1,
    "--presets": "demo",
    "--tokens": 8,
    "--overlap-tokens": 8,
}
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Finished:
    status: int
    output: str
    errors: str
    seconds: float


def bench(output: Path, **changed: Any) -> Finished:
    """Run the driver with tiny sizes and ``changed`` flags on two CPU ranks of its own."""
    flags = {**TINY, "--nproc": 2, "--device": "cpu", "--output": output}
    flags |= {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
    words = [str(word) for item in flags.items() for word in item]
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    command = [sys.executable, str(ROOT / "benchmarks" / "tp_allreduce.py"), *words]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    return Finished(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path]:
    output = tmp_path_factory.mktemp("bench") / "figures.json"
    done = bench(output)
    assert done.status == 0, done.output + done.errors
    return done, output


@pytest.fixture(scope="module")
def report(finished: tuple[Finished, Path]) -> dict[str, Any]:
    return json.loads(finished[1].read_text())


def test_every_collective_is_measured_at_every_size(report: dict[str, Any]) -> None:
    measured = [(record["collective"], record["bytes"]) for record in report["sweep"]]
    sizes = [1024, 4096, 16384]
    assert measured == [(operation.name, size) for operation in OPERATIONS for size in sizes]
    assert (report["ranks"], report["backend"], report["dtype"]) == (2, "gloo", "float32")
    assert report["environment"]["torch"] == torch.__version__


def test_no_element_is_wrong(report: dict[str, Any]) -> None:
    assert [record["wrong"] for record in report["sweep"] + report["activations"]] == [0] * 10


def test_bandwidths_follow_the_definitions_of_nccl_tests(report: dict[str, Any]) -> None:
    factors = {"all_reduce": 2 * (2 - 1) / 2, "all_gather": (2 - 1) / 2, "reduce_scatter": (2 - 1) / 2}
    for record in report["sweep"] + report["activations"]:
        algorithm = record["bytes"] / (record["median_us"] * 1e3)  # GB/s = bytes/ns
        assert record["algbw_gb_per_s"] == pytest.approx(algorithm, rel=1e-4)
        assert record["busbw_gb_per_s"] == record["algbw_gb_per_s"] * factors[record["collective"]]
        assert record["min_us"] <= record["median_us"] <= record["max_us"]
        assert 3 <= record["iterations"] <= 4


def test_activations_have_the_shape_of_the_preset(report: dict[str, Any]) -> None:
    (record,) = report["activations"]
    hidden = preset("demo").hidden_size
    assert (record["preset"], record["tokens"], record["hidden"]) == ("demo", 8, hidden)
    assert record["bytes"] == 8 * hidden * 4


def test_overlap_reports_the_raw_hidden_fraction(report: dict[str, Any]) -> None:
    (record,) = report["overlap"]
    times = [record[f"{name}_median_us"] for name in ("gemm", "collective", "both")]
    assert record["hidden_fraction"] == pytest.approx(hidden_fraction(*times), rel=1e-2, abs=1e-2)
    assert record["width"] == preset("demo").intermediate_size // 2


def test_what_a_cpu_has_not_is_said(report: dict[str, Any]) -> None:
    assert report["nvlink"].startswith("not measured: ")
    assert set(report["symmetric_memory"]) == set(VARIANTS)
    for told in report["symmetric_memory"].values():
        assert told == "not available: symmetric memory is of CUDA devices"
    assert {record["of_nvlink"] for record in report["sweep"]} == {None}


def test_tables_and_plot_are_written(finished: tuple[Finished, Path]) -> None:
    done, output = finished
    pytest.importorskip("matplotlib")
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for line in (
        "reduce_scatter 16K",
        "busbw GB/s",
        "Activation all-reduce, [8 tokens, hidden]",
        "multimem_all_reduce_",
    ):
        assert line in done.output, done.output


def test_buffers_that_do_not_fit_are_refused_in_one_line_by_one_rank(tmp_path: Path) -> None:
    done = bench(tmp_path / "x.json", max_bytes="1024T")
    assert done.status == 2
    assert done.errors.startswith("argonne: error: max_bytes=1024T needs ")
    assert "; legal: up to " in done.errors
    assert len(done.errors.splitlines()) == 1, done.errors
    assert done.output == ""
    assert not (tmp_path / "x.json").exists()
    assert done.seconds < 30


def test_one_rank_is_refused_before_it_starts(tmp_path: Path) -> None:
    done = bench(tmp_path / "x.json", nproc=1)
    assert (done.status, done.output) == (2, "")
    assert "nproc=1 has nothing to communicate; legal: 2 or more" in done.errors
    assert len(done.errors.splitlines()) == 1, done.errors


REFUSED = {
    "sizes": ({"min_bytes": "2M", "max_bytes": "1M"}, "min_bytes='2M' is more than max_bytes='1M'"),
    "no size": ({"min_bytes": "2X"}, "min_bytes='2X' is not a size; legal: a whole number of bytes"),
    "empty size": ({"max_bytes": ""}, "max_bytes='' is not a size"),
    "no bytes": ({"min_bytes": "0"}, "min_bytes='0' is not a size"),
    "too small": ({"min_bytes": "31"}, "min_bytes='31' is less than 16 bytes for each of 2 ranks; legal: 32 or more"),
    "factor": ({"factor": 1}, "factor=1 is not legal; legal: 2 or more"),
    "iterations": ({"iterations": 0}, "iterations=0 is not legal; legal: 1 or more"),
    "tokens": ({"tokens": 0}, "tokens=0 is not legal"),
    "overlap": ({"overlap_tokens": 0}, "overlap_tokens=0 is not legal"),
    "seconds": ({"seconds": float("nan")}, "seconds=nan is not legal"),
    "output": ({"output": Path("figures.png")}, "output='figures.png' is not a JSON file; legal: a path that ends in"),
    "preset": ({"presets": ("gpt-9",)}, "preset='gpt-9' is not known; legal: demo"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_flags_that_mean_nothing_are_refused(name: str) -> None:
    bad, expected = REFUSED[name]
    with pytest.raises(ArgonneError, match=expected.replace("(", r"\(")):
        resolve(Flags(**bad), "cpu", 2)


def test_too_many_ranks_for_the_integers_of_a_dtype_are_refused() -> None:
    with pytest.raises(ArgonneError, match="dtype='bfloat16' cannot count 257 ranks exactly; legal: float32"):
        resolve(Flags(), "cuda", 257)


def test_defaults_cover_the_whole_range_on_gpus_in_bfloat16() -> None:
    recipe = resolve(Flags(), "cuda", 8)
    assert (recipe.sizes[0], recipe.sizes[-1], len(recipe.sizes)) == (1024, 2**30, 11)
    assert recipe.dtype is torch.bfloat16
    assert recipe.overlap_tokens == recipe.tokens == 4096


def test_sizes_are_cut_to_equal_parts_of_16_bytes() -> None:
    recipe = resolve(Flags(max_bytes="1M"), "cpu", 3)
    assert all(size % 48 == 0 for size in recipe.sizes)
    assert recipe.sizes[0] == 1008


def test_the_largest_legal_value_fits_and_one_more_does_not() -> None:
    need = Need("tokens", 1, 10, fixed=55)
    available = 2000  # 90 % for two ranks: 900 each, so (900 - 55) // 10 = 84
    require_memory(replace(need, value=84), available, sharers=2)
    with pytest.raises(ArgonneError, match="tokens=85 needs .* each of the 2 ranks here.*legal: up to 84$"):
        require_memory(replace(need, value=85), available, sharers=2)
    with pytest.raises(ArgonneError, match="no value fits"):
        require_memory(replace(need, fixed=900), available, sharers=2)


def test_overlap_memory_is_that_of_its_four_buffers() -> None:
    per_token, fixed = overlap_bytes(preset("demo"), 2, torch.float32)
    hidden, width = preset("demo").hidden_size, preset("demo").intermediate_size // 2
    assert (per_token, fixed) == (4 * (hidden + hidden + width), 4 * hidden * width)


@pytest.mark.parametrize(
    ("text", "size"), [("64", 64), ("1k", 1024), ("256M", 2**28), (" 3G ", 3 * 2**30), ("2T", 2**41)]
)
def test_sizes_are_read_as_they_are_written(text: str, size: int) -> None:
    assert parse_size("max_bytes", text) == size
    assert size_text(size) == text.strip().upper()
