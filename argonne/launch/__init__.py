"""From a command line to running ranks, and how a process ends."""
