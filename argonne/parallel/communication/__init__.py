"""Which processes there are, and what they send each other."""
