"""The arithmetic between the matrix products. Each function here is the readable torch reference."""

from argonne.kernels.rms_norm import rms_norm
from argonne.kernels.rope import apply_rope, rope_tables
from argonne.kernels.swiglu import swiglu

__all__ = ["apply_rope", "rms_norm", "rope_tables", "swiglu"]
