"""The dtypes of a model: an explicit policy handed to every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from argonne.parallel.errors import ArgonneError


@dataclass(frozen=True)
class Precision:
    """Parameters (and so gradients and optimizer state) are kept in one dtype, and used in another."""

    parameters: torch.dtype = torch.float32
    """Master weights, their gradients and the optimizer's moments."""
    compute: torch.dtype = torch.float32
    """Activations, and the copies of the weights that matrix products see."""
    accumulate_in_product: bool = False
    """Linear layers add the product for the weight gradient straight to ``weight.grad``, in float32 or more,
    instead of rounding it to the compute dtype, casting and adding it. ``weight.grad`` of a bfloat16
    parameter is then float32. Autograd sees no gradient of the weight: hooks on it do not run, and
    ``torch.compile`` falls back to eager at each such layer."""

    @property
    def statistics(self) -> torch.dtype:
        """Losses, and whatever else is added up to be looked at: float32, or the compute dtype where it is wider."""
        return torch.promote_types(self.compute, torch.float32)


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "bf16": Precision(torch.float32, torch.bfloat16),
    "fp16": Precision(torch.float32, torch.float16),
    "fp64": Precision(torch.float64, torch.float64),
}
"""What the names of ``--precision`` mean, but for auto, which depends on the device."""


def resolve_precision(name: str, device: torch.device) -> Precision:
    """The dtypes that ``--precision`` means on ``device``."""
    check_precision(name)
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return PRECISIONS[name]


def check_precision(name: str) -> None:
    """Raise ``ArgonneError`` for a name that ``resolve_precision`` does not know."""
    if name not in ("auto", *PRECISIONS):
        raise ArgonneError(f"precision={name!r} is not known; legal: {', '.join(('auto', *PRECISIONS))}")
