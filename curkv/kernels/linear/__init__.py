"""Linear layers over weights packed once at load."""
