"""A job is left only when no thread of Gloo's has a tensor in hand: one that has aborts the interpreter's end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.pool import free_port
from tests.warm import SERVERS, environment

# In a group of its own, as a barrier of the same group would keep the tensor.
HOLD = """
import hashlib, threading, time
import torch, torch.distributed as dist
from argonne.parallel import Layout, process_groups

class Slow:
    def __del__(self):  # of a tensor: where the thread that lets go of it last wants the interpreter
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)
        print("main" if threading.current_thread() is threading.main_thread() else "thread", end=" ", flush=True)

with process_groups(Layout(tensor=2), torch.device("cpu")) as groups:
    group, x = dist.new_group(), torch.ones(4)
    x.slow = Slow()
    if not groups.is_first:
        time.sleep(0.5)
    dist.all_reduce(x, group=group, async_op=True)
    del x
print("left", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads can be looked at on Linux")
def test_a_job_is_left_when_every_thread_has_let_go_of_its_tensors(tmp_path: Path) -> None:
    script = tmp_path / "hold.py"
    script.write_text(HOLD)
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words, variables = [str(script)], [environment(RANK=str(rank), LOCAL_RANK=str(rank), **job) for rank in range(2)]
    with (tmp_path / "first").open("wb") as first, (tmp_path / "second").open("wb") as second:
        ranks = [SERVERS.start(words, *each) for each in zip(variables, (first.fileno(), second.fileno()), strict=True)]
        assert [rank.wait(60) for rank in ranks] == [0, 0]
    # The first rank waits for the other, and has dropped the tensor meanwhile.
    assert (tmp_path / "first").read_text().split() == ["thread", "left"]
    assert (tmp_path / "second").read_text().split() in (["thread", "left"], ["main", "left"])
