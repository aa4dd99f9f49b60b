"""The learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up from the minimum to the peak, then a half cosine back to the minimum (arXiv 1608.03983).

    A pure function of the step: nothing is stored, so nothing can be applied twice on a resume.
    """

    peak: float
    minimum: float
    warmup_steps: int
    total_steps: int
    rewarmup_after: int = 0
    """The step after which the optimizer was last reset."""
    rewarmup_steps: int = 0
    """Steps of the linear return from the minimum after a reset; 0 when there was none."""

    def learning_rate(self, step: int) -> float:
        """The rate of optimizer step ``step``, counted from 1; the last is ``total_steps``."""
        if step <= self.warmup_steps:
            height = step / self.warmup_steps
        else:
            progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
            height = 0.5 * (1 + math.cos(math.pi * progress))
        since_reset = step - self.rewarmup_after
        if 0 < since_reset < self.rewarmup_steps:
            height *= since_reset / self.rewarmup_steps
        return self.minimum + (self.peak - self.minimum) * height
