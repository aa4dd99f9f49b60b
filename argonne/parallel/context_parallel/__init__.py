"""Attention over sequences that several ranks share."""
