"""The learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["cosine", "wsd", "linear", "constant"]
Shape = Literal["linear", "cosine", "sqrt"]

FALL: Mapping[Shape, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "sqrt": lambda x: 1 - math.sqrt(x),
}
"""From the peak, 1, at x = 0 to the minimum, 0, at x = 1."""


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from the minimum to the peak, then one of four curves down to the minimum.

    With W warm-up steps, T steps in all and D steps of decay, step t stands at height h(t) between the minimum, 0, and
    the peak, 1. Up to W it is t / W (arXiv 1706.02677). After that

    - ``cosine``: (1 + cos(pi x)) / 2 with x = (t - W) / (T - W), without restarts (arXiv 1608.03983);
    - ``linear``: 1 - x with the same x (arXiv 1810.04805; down to zero, arXiv 2502.15938);
    - ``constant``: 1;
    - ``wsd``, warm-up, stable, decay (arXiv 2404.06395): 1 up to T - D, then with x = (t - T + D) / D the shape
      ``linear`` (1 - x), ``cosine`` ((1 + cos(pi x)) / 2) or ``sqrt`` (1 - sqrt(x), arXiv 2405.18392).

    A pure function of the step: nothing is stored, so nothing can be applied twice on a resume, and what decays from a
    step on is up to there what never decays.
    """

    peak: float
    minimum: float
    warmup_steps: int
    total_steps: int
    rewarmup_after: int = 0
    """The step after which the optimizer was last reset."""
    rewarmup_steps: int = 0
    """Steps of the linear return from the minimum after a reset; 0 when there was none."""
    kind: Kind = "cosine"
    decay_steps: int = 0
    """Of ``wsd``: the last steps, in which the rate falls."""
    decay_shape: Shape = "linear"
    """Of ``wsd``: how it falls."""

    @property
    def stable_steps(self) -> int:
        """Of ``wsd``: the last step before the decay."""
        return self.total_steps - self.decay_steps

    def learning_rate(self, step: int) -> float:
        """The rate of optimizer step ``step``, counted from 1; the last is ``total_steps``."""
        height = step / self.warmup_steps if step <= self.warmup_steps else self._height(step)
        since_reset = step - self.rewarmup_after
        if 0 < since_reset < self.rewarmup_steps:
            height *= since_reset / self.rewarmup_steps
        return self.minimum + (self.peak - self.minimum) * height

    def _height(self, step: int) -> float:
        """After the warm-up."""
        if self.kind == "constant":
            return 1.0
        if self.kind == "wsd":
            before, shape = self.stable_steps, self.decay_shape
        else:
            before, shape = self.warmup_steps, self.kind
        return FALL[shape](min(1.0, max(0, step - before) / max(1, self.total_steps - before)))
