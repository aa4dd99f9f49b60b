"""Figures in the README and in docs are those that the code gives, or that a benchmark has kept."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest

from argonne.models.config import PRESETS
from argonne.training.schedule import Schedule
from tests.models import same_bits
from tests.models.layout_matrix import every_case
from tests.models.test_every_layout import FAST, SLOW

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LAYOUTS = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
PROOFS = (ROOT / "docs" / "proofs.md").read_text(encoding="utf-8")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")
PAGES = [ROOT / "README.md", *(path for path in (ROOT / "docs").glob("*.md") if path.name != "log.md")]


def result(name: str) -> dict[str, Any]:
    """The figures that a benchmark has kept."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def example(name: str) -> ModuleType:
    """One of ``examples/``, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_presets_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| ([\w.-]+) \| (\d+) \| (\d+) \| (\d+) \((\d+)\) \| (\d+) \| (.*?) \| ([\d,]+)", README, re.M)
    assert [name for name, *_ in rows] == list(PRESETS)
    for name, *numbers, vocabulary, parameters in rows:
        config = PRESETS[name]
        shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
        assert tuple(map(int, numbers)) == (*shape, config.intermediate_size), name
        assert name == "demo" or vocabulary == f"{config.vocab_size:,}", name
        assert parameters == f"{config.parameter_count:,}", name


def test_the_demos_corpus_is_what_the_readme_says_and_its_held_out_speeches_are_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = example("demo_corpus")
    corpus.main(corpus.DemoCorpus(tmp_path))
    said = capsys.readouterr().out.replace(str(tmp_path), "runs/corpus").strip()
    assert said in README.splitlines()
    training = [text for path in tmp_path.glob("train-*") for text in pq.read_table(path)["text"].to_pylist()]
    held_out = [text for path in tmp_path.glob("held-out-*") for text in pq.read_table(path)["text"].to_pylist()]
    assert held_out
    assert not set(training) & set(held_out)
    assert said.startswith(
        f"{len(training) + len(held_out)} speeches, {sum(map(len, training + held_out)):,} characters"
    )
    assert f"| {len(list(tmp_path.glob('train-*')))} shards, " in README


def test_the_demos_log_in_the_readme_has_the_rates_tokens_and_samples_of_its_flags(tmp_path: Path) -> None:
    demo = example("demo")
    flags = dict(itertools.pairwise(demo.words(demo.Demo(tmp_path, tmp_path), 2)))
    batch, block = int(flags["--initial-batch-size"]), int(flags["--block-size"])
    peak, minimum = float(flags["--learning-rate"]), float(flags["--min-learning-rate"])
    schedule = Schedule(peak, minimum, int(flags["--warmup-steps"]), int(flags["--total-steps"]))
    assert flags["--gradient-accumulation-steps"] == "1"
    assert f"| {batch} x {block} tokens a step |" in README
    lines = re.findall(r"^step (\d+)/(\d+) \|.*?\| ([\d,]+) tokens \| lr (\S+) \|.*\| sample ([\d,]+),", README, re.M)
    assert len(lines) == len(re.findall(r"^step \d+/", README, re.M)) > 3
    for step, last, tokens, rate, sample in lines:
        assert last == flags["--total-steps"]
        assert tokens == f"{int(step) * batch * block:,}"
        assert rate == f"{schedule.learning_rate(int(step)):.2e}"
        assert sample == f"{int(step) * batch:,}"
    saves = re.findall(r"^saved runs/demo/step_0*(\d+)$", README, re.M)
    assert [int(step) % int(flags["--save-interval"]) for step in saves] == [0] * len(saves) != []


def test_the_numbers_of_layouts_are_those_that_the_tests_have() -> None:
    every, ours = len(list(every_case())), len(FAST) + len(SLOW)
    assert f"in each of {every} layouts" in README
    assert f"to 1e-9, weights to 1e-8 in float64: {ours} layouts" in PROOFS
    assert f"| the same for all {every} layouts | `make matrix` | on request |" in PROOFS
    assert f"trains 20 steps in each of {every} layouts" in LAYOUTS
    assert f"`make test` takes {ours} of them" in LAYOUTS


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (r"model built on it in (\d+) lines", "examples/custom_model.py"),
        (r"for\s+the\s+Argonne\s+model\s+in\s+(\d+)\s+lines", "argonne/models/staged.py"),
    ],
)
def test_lines_of_code_are_as_many_as_is_said(words: str, path: str) -> None:
    (said,) = (number for page in PAGES for number in re.findall(words, page.read_text(encoding="utf-8")))
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) == pytest.approx(int(said), rel=0.05)


def test_the_head_costs_as_many_blocks_as_is_said() -> None:
    config = PRESETS["argonne-2.0-2b"]
    blocks = config.vocab_size * config.hidden_size / config.block_parameter_count
    assert f"(a vocabulary of {config.vocab_size:,}\ncosts a 2B model as much as {blocks:.1f} blocks)" in LAYOUTS


def test_the_speeds_in_the_readme_are_those_that_were_measured() -> None:
    peers = result("tp_peers_cpu")["contestants"]["argonne TP 2"]
    assert f"{peers['ratio_to_dtensor']:.2f} times as fast as DTensor" in README
    assert f"{peers['ratio_to_dense']:.2f} times as fast as dense torch" in README
    apart = f"{result('tp_peers_cpu')['largest_relative_loss_difference']:.0e}".replace("e-0", "e-")
    assert f"losses equal to {apart};" in README

    megatron = result("tp_peers_megatron_cpu")
    assert f"({megatron['megatron_core']}, without its GPU kernels)" in README
    assert f"{megatron['ratio_to_megatron_core']:.2f} times as fast" in README
    assert f"with {megatron['cpu_of_megatron_core']:.2f} of the CPU time" in README


def test_the_moved_run_in_the_readme_is_the_one_that_was_measured() -> None:
    moved = result("moved_run_cpu")
    words = " ".join(README.replace("*", "").split())
    layouts = f"{', '.join(moved['layouts'][:-1])} and {moved['layouts'][-1]}"
    assert f"killed (SIGKILL) {NUMBERS[len(moved['killed'])]} times and continued as {layouts}" in words
    assert f"{moved['steps']} steps in float32" in words
    assert f"the first {moved['equal_bits_until']} steps" in words
    assert f"the largest difference of any loss is {moved['largest_difference']:.1e} nats" in words
    assert (ROOT / "docs" / "moved-run.png").is_file()


def test_what_sums_in_tree_order_cost_is_what_was_measured() -> None:
    page = (ROOT / "docs" / "reproducibility.md").read_text(encoding="utf-8")
    found: dict[int, list[str]] = {}
    for record in result("reproducible_cpu")["all-reduce"]["records"]:
        found.setdefault(record["bytes"], []).append(f"{record['ratio']:.2f} ({record['cpu_ratio']:.2f})")
    assert len(found) == 3
    for size, cells in found.items():
        assert f"| {size >> 20} MiB | {' | '.join(cells)} |" in page
    for record in result("reproducible_cpu")["step"]["records"]:
        assert f"| {record['layout']} | {record['ratio']:.2f} | {record['cpu_ratio']:.2f} |" in page
        assert record["ratio"] <= 1.3, "the demo is reproducible by default for as long as this holds"


def test_the_numbers_of_reproducible_layouts_are_those_that_the_tests_have() -> None:
    page = (ROOT / "docs" / "reproducibility.md").read_text(encoding="utf-8")
    layouts, few = len(same_bits.every_place()), len(same_bits.few_cases())
    assert f"| 3 steps in {few} layouts," in page
    assert f"| {layouts} layouts, 50 steps with two sets of options and 8 with eight;" in page
    assert f"3 steps in {few} layouts" in PROOFS
    assert f"50 steps in {layouts} layouts" in PROOFS


def test_the_data_pipelines_figures_in_the_readme_are_those_of_the_log() -> None:
    log = (ROOT / "docs" / "log.md").read_text(encoding="utf-8")
    assert "0.91 of the tokenizer alone" in log
    assert "15.6 times Hugging Face `datasets`" in log
    assert "data at 0.91 of the bare tokenizer's rate, 15.6 times `datasets` with `map`" in README


def test_no_test_draws_without_a_seed() -> None:
    """``random`` itself and generators without a seed cannot be replayed; ``draws`` prints the seed that it has."""
    unseeded = re.compile(
        r"\brandom\.(?!Random\(\w|default_rng\(\w|SystemRandom|get_?state)[a-z]\w*\(|\bRandom\(\)|default_rng\(\)"
    )
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "tests").rglob("*.py")
        if path.name != Path(__file__).name
        for line in path.read_text(encoding="utf-8").splitlines()
        if unseeded.search(line)
    ]
    assert found == []


def test_what_a_teacher_is_worth_is_what_was_measured() -> None:
    found = result("distillation_cpu")["held_out_loss"]
    page = (ROOT / "docs" / "after-pretraining.md").read_text(encoding="utf-8")
    told = re.findall(r"after (\d+) steps of 256 tokens a held-out loss of ([\d.]+);\ntrained .*, ([\d.]+) \(", page)
    assert told == [("200", f"{found['teacher']['200']:.2f}", f"{found['alone']['200']:.2f}")]
