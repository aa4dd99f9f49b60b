"""``--help`` says of every flag of every driver what really happens when the flag is left out."""

from __future__ import annotations

import dataclasses
import importlib
import re

import pytest

from argonne.launch import RestartFlags, parse
from argonne.training.config import (
    DataFlags,
    ModelFlags,
    ParallelFlags,
    ResumeConfig,
    RunConfig,
    RunFlags,
    TrainingFlags,
)
from argonne.training.model_flags import DEFAULT_PRESET

DRIVERS = {
    "examples.custom_model": "Config",
    "examples.demo": "Demo",
    "examples.demo_chats": "DemoChats",
    "examples.demo_corpus": "DemoCorpus",
    "examples.evaluate": "EvaluateConfig",
    "examples.generate": "GenerateConfig",
    "examples.perplexity": "PerplexityConfig",
    "argonne.training.config": "RunConfig",
    "argonne.training.distill_config": "DistillConfig",
    "argonne.training.config resume": "ResumeConfig",
    "argonne.training.run.resume_config distill": "ResumeDistillConfig",
    "argonne.training.run.resume_config tune": "ResumeTuneConfig",
    "argonne.training.tuning.config": "TuneConfig",
    "benchmarks.data_corpus": "Flags",
    "benchmarks.data_pipeline": "Flags",
    "benchmarks.generate": "Flags",
    "benchmarks.kernels": "Flags",
    "benchmarks.layouts": "Flags",
    "benchmarks.pretrain_step": "Flags",
    "benchmarks.token_ids": "Flags",
    "benchmarks.tp_allreduce": "Flags",
    "benchmarks.tp_peers": "Flags",
}


def told(config_type: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What ``--help`` says of each flag."""
    monkeypatch.setenv("COLUMNS", "100")  # wider help has two columns
    with pytest.raises(SystemExit) as stop:
        parse(config_type, ["--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert "default:" not in text
    flags: dict[str, str] = {}
    last = ""
    for line in (line.rstrip("│| ")[2:] for line in text.splitlines()):  # without its frame
        if found := re.match(r"(--[a-z][\w-]*)(.*?)(?:  +(.*))?$", line):
            last = found[1]
            flags[last] = found[3] or ("" if re.search(r"[}\]A-Z]$", found[2]) else found[2].strip())
        elif re.match(r"\W*[\w ]*options\b", line):
            last = ""  # a group, and what it is
        elif last and re.search(r"\w", line):
            flags[last] += f" {line.strip()}"
    return {flag: text.strip() for flag, text in flags.items()}


def field_of(flag: str) -> str:
    return flag.removeprefix("--").removeprefix("no-").replace("-", "_")


@pytest.mark.parametrize("driver", DRIVERS)
def test_every_flag_of_a_driver_ends_with_what_happens_without_it(
    driver: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config_type = getattr(importlib.import_module(driver.split()[0]), DRIVERS[driver])
    flags = told(config_type, capsys, monkeypatch)
    assert flags
    for flag, text in flags.items():
        assert re.search(r"\w.*( \[[^\[\]]+\]\.| ?\(required\))$", text), f"{flag}: {text!r}"
        assert not re.search(r"\[(None|True|False|auto|)\]", text), f"{flag}: {text!r}"


def test_the_preset_and_the_cache_are_told_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = told(RunConfig, capsys, monkeypatch)
    assert flags["--preset"].endswith(f"[{DEFAULT_PRESET}].")
    assert re.match(r"--no-streaming: tokenise once.*\[while training, without a cache", flags["--no-streaming"])
    assert flags["--total-steps"].endswith("[4000000].")
    assert flags["--learning-rate"].endswith("[0.0001].")
    assert flags["--document-mask"].endswith("[off].")
    assert flags["--output-dir"].endswith("[runs/argonne].")


def test_no_default_of_pretraining_is_told_of_what_a_resume_takes_as_it_was_saved(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed, begun = told(ResumeConfig, capsys, monkeypatch), told(RunConfig, capsys, monkeypatch)
    own = {"gradient_accumulation_steps", "output_dir", "stop_at_step", "wall_time"}
    saved = {
        field.name for group in (ModelFlags, DataFlags, TrainingFlags, RunFlags) for field in dataclasses.fields(group)
    }
    for flag, text in resumed.items():
        if field_of(flag) in saved - own:
            assert text.endswith("[as saved]."), flag
            assert text.removesuffix("[as saved].") == re.sub(r"\[[^\[\]]*\]\.$", "", begun[flag])
    layout = {field.name for field in dataclasses.fields(ParallelFlags) + dataclasses.fields(RestartFlags)}
    for flag, text in begun.items():  # the layout is that of the processes a resume is given
        if field_of(flag) in layout:
            assert resumed[flag] == text
    assert resumed["--gradient-accumulation-steps"].endswith("[what keeps the global batch].")
    assert resumed["--output-dir"].endswith("[the checkpoint's run].")
