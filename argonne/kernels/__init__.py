"""The arithmetic between the matrix products, each as a readable torch reference and as a Triton program.

``backend="auto"`` takes Triton for CUDA tensors and torch for all others; see docs/kernels.md.
"""

from argonne.kernels.cross_entropy import cross_entropy, linear_cross_entropy
from argonne.kernels.dispatch import Backend, KernelError
from argonne.kernels.modules import RMSNorm, RotaryEmbedding, SwiGLU
from argonne.kernels.rms_norm import rms_norm
from argonne.kernels.rope import apply_rope, apply_rope_packed
from argonne.kernels.rotation import rope_tables
from argonne.kernels.swiglu import swiglu
