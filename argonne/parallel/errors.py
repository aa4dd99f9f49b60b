"""The errors that a user is meant to read."""

from __future__ import annotations


class ArgonneError(ValueError):
    """A fault in what the user asked for: one line naming the field, its value and what is legal.

    Drivers print the message from one rank, without a traceback, and exit with status 2.
    """


class OutOfMemory(ArgonneError):
    """Memory has run out on this rank, and perhaps on it alone: it does not wait for another to report that."""


class LayoutError(ArgonneError):
    """A parallel layout that the model, the data or the number of processes does not allow."""


class LauncherError(LayoutError):
    """The environment that a launcher gave this process says what no rank of a job can be."""


class CollectiveMismatch(ArgonneError):
    """Ranks that are about to issue different collectives, as the checking mode of ``record`` found."""
