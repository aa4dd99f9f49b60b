"""What backward computes again instead of finding it kept (activation checkpointing, arXiv 1604.06174, 2205.05198)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from argonne.parallel.errors import ArgonneError
from argonne.parallel.legal import require_whole
from argonne.parallel.recomputed import selectively


@dataclass(frozen=True)
class Recompute:
    """Which blocks keep what: gradients have the same bits whatever it says."""

    every: int = 0
    """Each block whose number this divides keeps only its input, and computes the rest again, collectives included:
    1 for all of them. 0: none."""
    selective: bool = False
    """Each block keeps what products, attention and collectives make, and computes again what lies between them."""

    NONE: ClassVar[Recompute]
    """Everything is kept."""
    FULL: ClassVar[Recompute]
    """Every block keeps only its input."""
    SELECTIVE: ClassVar[Recompute]

    @classmethod
    def of(cls, word: str) -> Recompute:
        """What ``--recompute`` says. Raises ``ArgonneError`` when it does not."""
        if word in _WORDS:
            return _WORDS[word]
        if not (word.isascii() and word.isdigit() and int(word)):
            raise ArgonneError(
                f"recompute={word!r} is not known; legal: full, selective, none, or N to recompute every Nth block"
            )
        return cls(every=int(word))

    def __post_init__(self) -> None:
        require_whole("recompute", self.every, 0)
        if self.every and self.selective:
            raise ArgonneError(f"recompute={self.every} and selective at once is not legal; legal: one of them")

    def is_full(self, number: int) -> bool:
        """Whether the block of that number, counted over the whole model, keeps only its input."""
        return bool(self.every) and number % self.every == 0

    def run(self, number: int, block: Callable[..., Tensor], x: Tensor, *inputs: object) -> Tensor:
        """``block(x, *inputs)`` of the block of that number, with a backward pass to come."""
        if self.is_full(number):
            result: Tensor = checkpoint(block, x, *inputs, use_reentrant=False, preserve_rng_state=False)
            return result
        return selectively(block, x, *inputs) if self.selective else block(x, *inputs)

    def __str__(self) -> str:
        return next((word for word, known in _WORDS.items() if known == self), str(self.every))


Recompute.NONE, Recompute.FULL, Recompute.SELECTIVE = Recompute(), Recompute(every=1), Recompute(selective=True)
_WORDS = {"full": Recompute.FULL, "selective": Recompute.SELECTIVE, "none": Recompute.NONE}
