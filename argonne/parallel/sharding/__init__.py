"""Which region of which whole tensor a rank holds, and what follows from that."""
