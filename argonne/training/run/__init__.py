"""What a run is, where it lies, and how it begins and goes on."""
