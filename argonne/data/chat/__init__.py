"""Conversations: rows of messages to ids, and to the positions that are trained: what the assistant says."""
