"""Measurements: kernels against the machine's bandwidth, the server against other ways to run the same model."""
