"""SIGTERM, Ctrl-C and a lost terminal: what each asks for, at every moment of a process's life.

Before and after training the first signal ends the process. While it trains, the first is a request, which all ranks
grant together between two steps, and a second one ends the process at once. One request may arrive as several signals:
of Ctrl-C in a terminal torchrun makes one for each rank, and a scheduler signals the launcher and its ranks alike.
What comes within ``ONE_REQUEST`` seconds of the first is therefore the same request.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from argonne.launch.refusal import STOPPING
from argonne.parallel.communication.environment import this_process

ONE_REQUEST = 1.0
"""Seconds within which several signals are one request."""


class StopRequest:
    """Whether a signal has asked this process to stop.

    A thread acts on the signals: the main thread may be in a collective, and would hear of them when that is done.
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        """The signal that asked first."""
        self._patient = False
        self._asked_at = 0.0
        self._reading = -1

    def listen(self) -> None:
        """From here on the first signal ends this process; to be called in the main thread."""
        self._reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in heeded():
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._hear, name="argonne-signals", daemon=True).start()

    def hand_over(self) -> None:
        """Leave the signals to whoever handles them from here on: a launcher's agent."""
        if self._reading >= 0:
            os.close(signal.set_wakeup_fd(-1))  # the thread ends with it
            self._reading = -1

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Meanwhile the first signal is only noted: somebody looks at ``number`` now and then."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def _hear(self) -> None:
        reading = self._reading
        while heard := os.read(reading, 64):
            for number in heard:
                if number in STOPPING:
                    self._act(signal.Signals(number))
        os.close(reading)

    def _act(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._asked_at = number, now
            if self._patient:
                return
        elif now - self._asked_at <= ONE_REQUEST:
            return
        if not this_process().launched:  # else the launcher says it
            with contextlib.suppress(OSError):
                # Not by print: the main thread may be printing, and then never let go.
                os.write(2, f"argonne: stopped by {number.name}. The same command continues the run.\n".encode())
        os._exit(128 + number)  # torchrun may start it again: so it also signals the ranks of an attempt that failed


def heeded() -> list[signal.Signals]:
    """``STOPPING`` without what is to be ignored, as ``nohup`` or a shell in the background has it."""
    return [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]


STOP = StopRequest()
"""This process's: signals are of a process, not of a run in it."""
