"""Measurements: kernels against the machine's bandwidth, a server against other ways to run its model."""
