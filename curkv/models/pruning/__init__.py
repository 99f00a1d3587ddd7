"""Structured pruning: rows of the MLP are removed, and the rest is saved as an ordinary checkpoint."""
