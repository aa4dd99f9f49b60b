"""Trained models: text from them, and how well they predict one."""

from argonne.inference.generate import cache_line, continue_all, generate
from argonne.inference.sampling import Sampling

__all__ = ["Sampling", "cache_line", "continue_all", "generate"]
