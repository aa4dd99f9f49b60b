"""A sound checkpoint, and a copy of it to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from argonne.parallel import ProcessGroups
from tests.checkpoint.saved import save


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(ProcessGroups.single(), tmp_path_factory.mktemp("sound"), 1, 0, 4000)


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / sound.name))
