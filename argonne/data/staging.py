"""From an array that a thread has read to a tensor on the device, while the model computes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Staged:
    """An array on its way to the device."""

    tensor: Tensor
    arrived: torch.cuda.Event | None

    def take(self) -> Tensor:
        """The tensor, for the current stream to use: the stream waits for the copy, this thread does not."""
        if self.arrived is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.arrived)
            self.tensor.record_stream(stream)  # its memory was allocated on the copying stream
        return self.tensor


class Staging:
    """Copies arrays of one shape and dtype to ``device``: through page-locked buffers that take turns, on a stream
    of its own. On a CPU nothing is copied."""

    def __init__(self, device: torch.device, buffers: int = 2) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: list[tuple[Tensor, torch.cuda.Event]] = []
        self._count, self._turn = buffers, 0

    def put(self, array: npt.NDArray[np.int64]) -> Staged:
        """Begin to copy ``array``, which may be changed afterwards on a GPU and may not on a CPU."""
        source = torch.from_numpy(array)
        if self._stream is None:
            return Staged(source, None)
        if len(self._buffers) < self._count:
            self._buffers.append((torch.empty_like(source).pin_memory(), torch.cuda.Event()))
        pinned, arrived = self._buffers[self._turn % self._count]
        self._turn += 1
        arrived.synchronize()  # the copy that this buffer was last used for
        pinned.copy_(source)
        with torch.cuda.stream(self._stream):
            tensor = pinned.to(self.device, non_blocking=True)
            arrived.record(self._stream)
        return Staged(tensor, arrived)
