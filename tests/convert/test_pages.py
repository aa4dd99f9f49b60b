"""The commands of docs/convert.md and of the README's tables run as printed, on files made in the old forms."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from argonne.convert import ConvertFlags
from argonne.convert.shapes import OldFileFlags
from argonne.data import boundary_tokens, train_tokenizer, write_tokenizer
from argonne.launch import parse
from argonne.models import ArgonneConfig
from tests.convert import old
from tests.export import export
from tests.integration.runs import ROOT

PAGE, README = ((ROOT / name).read_text() for name in ("docs/convert.md", "README.md"))
COMMAND = re.compile(r"python (examples/convert\.py [^`\n|]*[^`\n| ])")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which there is what the commands name."""
    tokenizer = train_tokenizer(["some words of a text, and a few more "] * 9, 300)
    config = ArgonneConfig(24, 2, 6, 3, len(tokenizer), 40, max_position_embeddings=32)
    state = old.argonne2(config)
    old.saved(tmp_path / "old-2.0.pth", old.checkpoint(state, config={}))
    shards = old.shards(state, 3)
    old.saved(tmp_path / "old-shards.pth", old.checkpoint({}, tensor_parallel_shards=shards, world_size=3))
    old.saved(tmp_path / "old-1.5.pth", old.checkpoint(old.argonne1(), config={}))
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tokenizer, tmp_path / "tokenizer")
    export(tmp_path / "runs" / "demo", config, tokenizer, boundary_tokens(tokenizer))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(commands: list[str]) -> None:
    """Each as the driver runs it, in this process: it would take longest to start."""
    driver = importlib.import_module("examples.convert")
    for command in commands:
        driver.main(parse(driver.ConvertConfig, shlex.split(command)[1:]))


def test_every_command_of_the_page_runs(here: Path) -> None:
    commands = COMMAND.findall(PAGE.partition("## Each way")[2])
    assert len(commands) == PAGE.partition("## Each way")[2].count("convert.py")
    run(commands)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        first, last = (AutoModelForCausalLM.from_pretrained(here / name)(ids).logits for name in ("2.0", "shards"))
    assert torch.equal(first, last)
    assert json.loads((here / "2.0" / "config.json").read_text())["eos_token_id"] == 2
    assert (here / "demo.gguf").stat().st_size < (here / "2.0.gguf").stat().st_size


def test_every_command_of_the_readme_runs(here: Path) -> None:
    commands = COMMAND.findall(README)
    assert len(commands) == README.count("examples/convert.py") > 4
    run(sorted(commands, key=lambda command: "demo-dcp demo-again" in command))  # of what another makes
    assert AutoModelForCausalLM.from_pretrained(here / "demo-again").config.vocab_size > 200


def test_every_flag_is_on_the_page() -> None:
    names = {field.name for flags in (ConvertFlags, OldFileFlags) for field in fields(flags)} - {"old"}
    assert {flag for name in names if (flag := f"--{name.replace('_', '-')}") not in PAGE} == set()


def test_what_cannot_be_converted_ends_in_one_line(here: Path) -> None:
    words = [sys.executable, str(ROOT / "examples" / "convert.py"), "old-2.0.pth", "2.0"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("argonne: error: 'old-2.0.pth': num_attention_heads is not known: queries have 24 features")
    assert not (here / "2.0").exists()
