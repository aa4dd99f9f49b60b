"""Loss scaling for float16: gradients too small for it are computed larger, and brought back in float32."""

from __future__ import annotations

from dataclasses import dataclass

GROWTH_INTERVAL = 2000
"""Steps without an overflow after which the scale doubles; that and the halving are PyTorch's GradScaler's."""


@dataclass
class LossScale:
    """By how much the loss is multiplied. Every rank decides by the global norm, and so decides alike."""

    scale: float = 1.0
    is_dynamic: bool = False
    steps_since_change: int = 0

    @classmethod
    def of(cls, precision: str, initial: float) -> LossScale:
        """That of a ``--precision``: dynamic for fp16, 1 for all others."""
        return cls(initial, True) if precision == "fp16" else cls()

    def overflowed(self) -> bool:
        """Halve the scale after gradients that were not finite; False if it cannot help."""
        if not self.is_dynamic or self.scale <= 1.0:
            return False
        self.scale, self.steps_since_change = self.scale / 2, 0
        return True

    def succeeded(self) -> None:
        """Count a step whose gradients were finite; after many, try twice the scale."""
        if not self.is_dynamic:
            return
        self.steps_since_change += 1
        if self.steps_since_change == GROWTH_INTERVAL:
            self.scale, self.steps_since_change = self.scale * 2, 0
