from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.pool import RankPool

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile(
    "argonne", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=20, print_blob=True
)
settings.load_profile("argonne")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Real Gloo processes, started once for the whole session."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def torch_seed() -> None:
    """What a test draws without a generator of its own is the same whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def draw() -> random.Random:
    """Draws that differ from run to run; a test that fails prints what replays them."""
    seed = int(os.environ.get("ARGONNE_TEST_SEED") or random.SystemRandom().getrandbits(32))
    print(f"to draw the same again: ARGONNE_TEST_SEED={seed}")
    return random.Random(seed)
