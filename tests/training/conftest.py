from __future__ import annotations

import pytest

from tests.training.settled import SmallRun


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """What small runs share; nothing may change it."""
    return SmallRun.settle(tmp_path_factory.mktemp("small"))
