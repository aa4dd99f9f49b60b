"""Keeping replicas at one model: replicated, ZeRO stage 1, fully sharded."""
