"""What glibc is told of the ranks that a driver starts on CPUs: to keep what they free, in large pages.

A step asks for the same blocks as the step before. As it comes, glibc returns many of them to the system, which hands
them out again page by page, each cleared: of a step of ``benchmarks/tp_peers.py`` that is a tenth of the time. How much
more memory a process then has is in docs/running.md. A run that has a limit returns large blocks all the same
(``argonne/training/machine.py``), as it says so later, and glibc does what it was told last.
"""

from __future__ import annotations

from collections.abc import MutableMapping

KEEPING = {
    "GLIBC_TUNABLES": ":".join(
        (
            "glibc.malloc.hugetlb=1",  # asked for, where the system leaves it to programs; older versions ignore it
            f"glibc.malloc.mmap_threshold={32 << 20}",  # the most that it takes
            f"glibc.malloc.trim_threshold={1 << 40}",
        )
    )
}
"""Variables of a process that keeps what it frees."""
_PREFIX = "MALLOC_"  # of glibc's older variables, and of other allocators'


def keep_freed_memory(environment: MutableMapping[str, str]) -> None:
    """Have what is started with ``environment`` keep what it frees, unless it is told there how to allocate."""
    if not any(name in KEEPING or name.startswith(_PREFIX) or name == "LD_PRELOAD" for name in environment):
        environment.update(KEEPING)
