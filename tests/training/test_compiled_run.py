"""A run of compiled blocks: the same whether it is stopped or not, and refused where it cannot be what flags ask."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.launch import parse
from argonne.parallel import ArgonneError, Layout
from argonne.training.config import ResumeConfig, RunConfig
from argonne.training.run.checks import check
from argonne.training.run.compilation import check_compile, compiles, is_asked, latest_of_two
from argonne.training.run.workflow import pretrain
from tests.integration.runs import (
    MODEL,
    SCHEDULE,
    command,
    finish,
    history,
    run_until_killed,
    start,
    succeed,
    weights,
    write_corpus,
)
from tests.models.compiled import as_graphs
from tests.training.small_run import small_run

CPU, GPU = torch.device("cpu"), torch.device("cuda")
AGAINST = {
    "--reproducible": "reproducible=True: ",
    "--pipeline-parallel 2 --pipeline-schedule zb": "pipeline_schedule='zb': ",
    "--trace 3": "trace='3': ",
}


def of(words: str) -> RunConfig:
    return parse(RunConfig, words.split())


def test_blocks_are_compiled_on_a_gpu_unless_told_not_to_and_on_a_cpu_if_told_to() -> None:
    assert [is_asked(of(words), GPU) for words in ("", "--compile", "--disable-compile")] == [True, True, False]
    assert [is_asked(of(words), CPU) for words in ("", "--compile", "--disable-compile")] == [False, True, False]
    with pytest.raises(ArgonneError, match=r"^compile=True conflicts with disable_compile=True; legal: one of them$"):
        check_compile(of("--compile --disable-compile"), Layout(), GPU, own_model=False)


@pytest.mark.parametrize("words", AGAINST)
def test_what_cannot_be_compiled_is_refused_if_asked_for_and_eager_if_not(words: str) -> None:
    layout = Layout(pipeline=2) if "pipeline" in words else Layout()
    for device in (CPU, GPU):
        with pytest.raises(ArgonneError) as refusal:
            check_compile(of(f"--compile {words}"), layout, device, own_model=False)
        assert str(refusal.value).startswith(f"compile=True conflicts with {AGAINST[words]}")
        assert str(refusal.value).endswith("; legal: one of them, or --disable-compile")
        check_compile(of(words), layout, device, own_model=False)
        assert not compiles(of(words), layout, device, own_model=False)
    with pytest.raises(ArgonneError, match="^compile=True conflicts with "):  # of every driver, before a rank starts
        check(of(f"--compile --device cpu {words}"), layout.world_size)
    assert compiles(of(""), layout, GPU, own_model=False)
    assert not compiles(of(""), layout, GPU, own_model=True)


@pytest.mark.parametrize(
    ("saved", "named", "expected"),
    [
        ("", "--compile", True),
        ("--compile", "", True),
        ("--compile", "--disable-compile", False),
        ("--disable-compile", "--compile", True),
        ("--disable-compile", "", False),
    ],
)
def test_a_resume_that_names_one_of_the_two_takes_the_other_back(saved: str, named: str, expected: bool) -> None:
    words = ["--checkpoint-path", "x", *named.split()]
    default = replace(parse(ResumeConfig, words[:2]), training=of(saved).training)
    found = parse(ResumeConfig, words, default)
    training = latest_of_two(found.training, found.given)
    assert is_asked(replace(found, training=training), CPU) is expected
    assert not (training.compile and training.disable_compile)


def compiled_run(home: Path) -> RunConfig:
    """Four steps with document masks and a held-out loss at every second one."""
    config = small_run(home)
    data = replace(config.data, document_mask=True, validation_glob=config.data.data_glob, validation_sequences=3)
    return replace(config, data=data, training=replace(config.training, compile=True))


def stopped_at(config: RunConfig, directory: str, step: int | None) -> RunConfig:
    run = replace(config.run, output_dir=config.run.output_dir.parent / directory, stop_at_step=step)
    return replace(config, run=run)


@pytest.mark.parametrize("interpreted", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_a_compiled_run_that_is_stopped_and_continued_equals_the_undisturbed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], interpreted: bool
) -> None:
    """To the bit; compiled anew, before the first step of each start, and not once afterwards."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    config = compiled_run(tmp_path)
    for directory, step in (("whole", None), ("stopped", 2), ("stopped", None)):
        torch._dynamo.reset()
        counters.clear()
        with as_graphs() if interpreted else nullcontext():
            assert pretrain(stopped_at(config, directory, step)) == 0
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert history(stopped) == history(whole)
    assert weights(stopped) == weights(whole)
    saved = json.loads((whole / "step_00000004" / "trainer.json").read_text())
    assert saved["conditions"]["compile"] is True
    assert saved["changes"] == []
    output = capsys.readouterr().out
    assert output.count("compiling 1 block on each rank") == output.count("compiled as 1 graph in ") == 3
    torch._dynamo.reset()


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", ["--tensor-parallel 2 --sequence-parallel", "--fsdp --data-parallel 2"])
def test_a_compiled_run_that_is_killed_and_continued_equals_the_undisturbed_one(tmp_path: Path, layout: str) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    flags: dict[str, Any] = {**MODEL, **SCHEDULE, "--data-glob": f"{corpus}/*.parquet", "--document-mask": None}
    flags |= {"--validation-glob": f"{corpus}/part-0.parquet", "--validation-sequences": 5, "--compile": None}
    words = layout.split()
    flags |= {word: None if n + 1 == len(words) or words[n + 1].startswith("--") else words[n + 1]
              for n, word in enumerate(words) if word.startswith("--")}  # fmt: skip
    output = succeed("pretrain", {**flags, "--output-dir": tmp_path / "whole"})
    assert output.count("compiled as 1 graph in ") == 1
    run_until_killed("pretrain", {**flags, "--output-dir": tmp_path / "killed"}, steps=6)
    assert "continuing from" in succeed("pretrain", {**flags, "--output-dir": tmp_path / "killed"})
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.exhaustive
def test_without_a_compiler_a_run_is_eager_says_so_once_and_keeps_that(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    flags: dict[str, Any] = {**MODEL, **SCHEDULE, "--data-glob": f"{corpus}/*.parquet", "--tensor-parallel": 2}
    succeed("pretrain", {**flags, "--output-dir": tmp_path / "eager"})
    variables = {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    words = command("pretrain", {**flags, "--compile": None, "--output-dir": tmp_path / "compiled"})
    done = finish(start(words, **variables))
    assert done.status == 0, done.output
    said = [line for line in done.output.splitlines() if "eager" in line]
    assert len(said) == 1, done.output
    assert said[0].startswith("rank 0 cannot compile model.layers.0 (")
    assert said[0].endswith("): every rank computes eagerly")
    saved = json.loads((tmp_path / "compiled" / "step_00000012" / "trainer.json").read_text())
    assert saved["changes"] == [{"step": 0, "text": said[0]}]
    assert weights(tmp_path / "compiled") == weights(tmp_path / "eager")
