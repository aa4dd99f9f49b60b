"""Layers and losses whose weights are cut over the tensor-parallel ranks."""
