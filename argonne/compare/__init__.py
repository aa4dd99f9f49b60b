"""Are two runs, or two checkpoints, the same to the last bit? If not: where, and how far apart."""
