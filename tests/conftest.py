from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.pool import RankPool
from tests.smollm2 import smollm2 as smollm2

os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts it so in the background, and all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile(
    "argonne", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=20, print_blob=True
)
settings.load_profile("argonne")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


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
