"""Tokens made once, before training, and read in a shuffled order."""
