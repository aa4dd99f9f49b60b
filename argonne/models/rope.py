"""Rotary frequencies that are stretched, for contexts longer than those that a model was first trained on.

Three ways, under the names that ``transformers`` has for them: ``linear`` (positions divided by a factor), ``llama3``
(slow frequencies divided, fast ones kept) and ``yarn`` (arXiv 2309.00071). None of them depends on the length of a
sequence, so that tables are made once; ``dynamic``, which does, is not offered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from argonne.kernels.rotation import rope_frequencies
from argonne.parallel.errors import ArgonneError
from argonne.parallel.legal import require_number, require_whole

NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""What each type must be told."""
OPTIONAL = {
    "linear": (),
    "llama3": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
"""What each type may be told besides."""


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies of a model are stretched. What its type does not read is None.

    Raises:
        ArgonneError: a field is missing, out of range, or not one of the type's.
    """

    rope_type: str
    """``linear``, ``llama3`` or ``yarn``."""
    factor: float
    """How many times longer the context is made."""
    original_max_position_embeddings: int | None = None
    """The longest sequence before that."""
    low_freq_factor: float | None = None
    """llama3: what turns less often than this in the original context is stretched whole."""
    high_freq_factor: float | None = None
    """llama3: what turns more often than this is left alone."""
    attention_factor: float | None = None
    """yarn: what the tables are multiplied by; None: as the factor and the two ``mscale`` say."""
    beta_fast: float | None = None
    """yarn: what turns more often than this in the original context is left alone; None: 32."""
    beta_slow: float | None = None
    """yarn: what turns less often than this is stretched whole; None: 1."""
    mscale: float | None = None
    """yarn: with ``mscale_all_dim``, the two weights whose quotient is the attention factor."""
    mscale_all_dim: float | None = None
    """yarn: see ``mscale``."""
    truncate: bool | None = None
    """yarn: whether the two borders are whole pairs; None: they are."""

    def __post_init__(self) -> None:
        if self.rope_type not in NEEDED:
            raise ArgonneError(f"rope_scaling.rope_type={self.rope_type!r} is not known; legal: {', '.join(NEEDED)}")
        needed, optional = NEEDED[self.rope_type], OPTIONAL[self.rope_type]
        for name in (field.name for field in fields(self) if field.name != "rope_type"):
            value = getattr(self, name)
            if value is not None and name not in (*needed, *optional):
                raise ArgonneError(
                    f"rope_scaling.{name}={value!r} has no meaning with rope_type={self.rope_type!r}; legal: "
                    f"{', '.join((*needed, *optional))}"
                )
            if value is not None or name in needed:
                self._check(name, value)
        fast, slow = self.beta_fast or 32.0, self.beta_slow or 1.0
        if fast < slow:
            raise ArgonneError(f"rope_scaling.beta_fast={fast} is less than beta_slow={slow}; legal: {slow} or more")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and high <= low:
            raise ArgonneError(
                f"rope_scaling.high_freq_factor={high} is not more than low_freq_factor={low}; legal: more than {low}"
            )

    def _check(self, name: str, value: Any) -> None:
        """Refuse a value of another type or out of range; a number becomes a float."""
        shown = f"rope_scaling.{name}"
        if name == "original_max_position_embeddings":
            require_whole(shown, value, 1)
            return
        if name == "truncate":
            if not isinstance(value, bool):
                raise ArgonneError(f"{shown}={value!r} is not legal; legal: True, False")
            return
        require_number(shown, value, zero=name.startswith("mscale"))
        if name == "factor" and value < 1:
            raise ArgonneError(f"{shown}={value} is not legal; legal: 1 or more")
        object.__setattr__(self, name, float(value))

    def as_json(self) -> dict[str, Any]:
        """What there is of it."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def frequencies(self, head_dim: int, theta: float) -> Tensor:
        """Radians that each pair of a head turns by from a position to the next: float64 ``[head_dim / 2]``."""
        plain = rope_frequencies(head_dim, theta)
        slow = plain / self.factor
        if self.rope_type == "linear":
            return slow
        kept = self._kept_llama3(plain) if self.rope_type == "llama3" else self._kept_yarn(plain, head_dim, theta)
        return kept * plain + (1 - kept) * slow

    def _kept_llama3(self, plain: Tensor) -> Tensor:
        """The share of each frequency that is left alone: from none to all between two numbers of turns."""
        original, low, high = self.original_max_position_embeddings, self.low_freq_factor, self.high_freq_factor
        assert original is not None
        assert low is not None
        assert high is not None
        return ((original * plain / (2 * math.pi) - low) / (high - low)).clamp(0, 1)

    def _kept_yarn(self, plain: Tensor, head_dim: int, theta: float) -> Tensor:
        """The same by the pair's number: in a line between those that turn ``beta_fast`` and ``beta_slow`` times."""
        assert self.original_max_position_embeddings
        first, last = (
            head_dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (self.beta_fast or 32.0, self.beta_slow or 1.0)
        )
        if self.truncate is not False:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        if first == last:
            last += 0.001  # as the authors' code has it: a step, and no division by zero
        pair = torch.arange(len(plain), dtype=torch.float64, device=plain.device)
        return 1 - ((pair - first) / (last - first)).clamp(0, 1)

    @property
    def scale(self) -> float:
        """What cosines and sines are multiplied by: queries and keys both, so that scores grow by its square."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._grown(self.mscale) / self._grown(self.mscale_all_dim)
        return self._grown(1.0)

    def _grown(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0
