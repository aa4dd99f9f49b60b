"""The training workflow: configuration, the loop, and what a run leaves behind."""
