"""Checkpoints and runs at tensor parallelism 1 and 2; nothing may change them, and a test takes copies."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from argonne.data import train_tokenizer
from argonne.parallel import Layout, ProcessGroups
from tests.checkpoint.saved import save
from tests.compare.planted import Tool
from tests.integration.runs import MODEL, SCHEDULE, succeed, write_corpus
from tests.pool import RankPool


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(capsys)


@pytest.fixture(scope="session")
def saved_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that one process has written, in several files."""
    return save(ProcessGroups.single(), tmp_path_factory.mktemp("alone"), 1, 0, 4000)


@pytest.fixture(scope="session")
def saved_by_two(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same values, written at tensor parallelism 2, in two files."""
    return Path(ranks.run(Layout(tensor=2), save, tmp_path_factory.mktemp("two"), 1, 0)[0])


@pytest.fixture
def copy(saved_alone: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_alone, tmp_path / saved_alone.name))


@pytest.fixture(scope="session")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of eight steps that saves at the fourth and the last."""
    home = tmp_path_factory.mktemp("home")
    corpus = write_corpus(home / "corpus", documents=40)
    train_tokenizer(["some words and more of them"] * 9).save_pretrained(home / "tokenizer")
    given = {"--data-glob": corpus / "*.parquet", "--tokenizer-path": home / "tokenizer", "--total-steps": 8}
    return {**MODEL, **SCHEDULE, **given}


@pytest.fixture(scope="session")
def run_alone(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "alone"
    succeed("pretrain", {**flags, "--output-dir": directory}, nproc=1)
    return directory


@pytest.fixture(scope="session")
def run_of_two(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "two"
    succeed("pretrain", {**flags, "--output-dir": directory}, nproc=2)
    return directory


@pytest.fixture
def other_run(run_alone: Path, tmp_path: Path) -> Path:
    """A copy of the run of one process."""
    return Path(shutil.copytree(run_alone, tmp_path / "other"))
