"""What a process keeps of memory that its tensors have given back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from argonne.launch.allocation import KEEPING

# Once a block of that size has been freed, glibc takes such blocks from the heap, where they cannot go back to the
# system while anything lies behind them: every other block stays, whatever gaps the heap had before.
BLOCKS = """
import sys

import torch

from argonne.training.machine import resident_bytes, return_large_blocks

if sys.argv[1] == "returned":
    return_large_blocks()
first = torch.ones(4 << 20)
del first
before = resident_bytes()
blocks = [torch.ones(3 << 20) for _ in range(20)]
del blocks[::2]
print(resident_bytes() - before - (10 * 12 << 20) >> 20)
"""


def command(word: str) -> list[str]:
    return [sys.executable, "-c", BLOCKS, word]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another library allocates")
def test_large_blocks_go_back_to_the_system_as_they_are_freed() -> None:
    untold = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    kept, returned, told_last = (
        int(subprocess.run(words, env={**untold, **variables}, capture_output=True, check=True, text=True).stdout)
        for words, variables in ((command("kept"), {}), (command("returned"), {}), (command("returned"), KEEPING))
    )
    assert returned < 16, f"{returned} MiB are still there"
    assert told_last < 16, f"{told_last} MiB are still there, as the launcher had said"
    assert kept > 64, f"only {kept} MiB were kept: this shows nothing"
