"""Argonne: modular parallelism for pretraining language models."""

__version__ = "0.1.0"
