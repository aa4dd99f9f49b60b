"""Text from trained models."""

from argonne.inference.generate import Sampling, generate

__all__ = ["Sampling", "generate"]
