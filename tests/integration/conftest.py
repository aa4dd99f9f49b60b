from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.runs import MODEL, SCHEDULE, succeed, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def flags(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The flags of a small run; its tokenizer is trained once."""
    first = {"--data-glob": corpus / "*.parquet", **MODEL, **SCHEDULE}
    seed = tmp_path_factory.mktemp("seed")
    succeed("pretrain", {**first, "--output-dir": seed, "--stop-at-step": 1}, nproc=1)
    return {**first, "--tokenizer-path": seed / "tokenizer"}


@pytest.fixture(scope="session")
def uninterrupted(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run at tensor parallelism 2 that nothing disturbed."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    succeed("pretrain", {**flags, "--output-dir": directory})
    return directory
