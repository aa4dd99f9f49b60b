"""The stages of a model, and the order in which they work."""
