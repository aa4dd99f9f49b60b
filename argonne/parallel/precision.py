"""The dtypes of a model: an explicit policy handed to every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """Parameters (and so gradients and optimizer state) are kept in one dtype, and used in another."""

    parameters: torch.dtype = torch.float32
    """Master weights, their gradients and the optimizer's moments."""
    compute: torch.dtype = torch.float32
    """Activations, and the copies of the weights that matrix products see."""
