"""Trained models: text from them, and how well they predict one."""

from argonne.inference.generate import Sampling, generate

__all__ = ["Sampling", "generate"]
