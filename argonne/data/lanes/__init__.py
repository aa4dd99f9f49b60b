"""From a corpus to endless sequences, resumable at any token."""
