"""One line of a comparison, whether it tells of a difference, and how all of them are printed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from argonne.output import show

MOST = 20
"""Lines about one kind of difference; of what is past them, the number."""


@dataclass(frozen=True)
class Finding:
    """What a comparison or a check found."""

    text: str
    """One line."""
    differs: bool = True
    """Whether it is a difference or a fault; False for what is equal, and for what a reader should know besides."""


def at_most(lines: Sequence[str], of: str) -> Iterator[Finding]:
    """The first ``MOST`` of ``lines`` as differences, and how many more ``of`` them there are."""
    yield from map(Finding, lines[:MOST])
    if len(lines) > MOST:
        yield Finding(f"... and {len(lines) - MOST:,} more {of}")


def report(findings: Iterable[Finding]) -> int:
    """Print each as it comes; 1 if one of them is a difference or a fault, else 0."""
    status = 0
    for finding in findings:
        show(finding.text)
        status |= finding.differs
    return status
