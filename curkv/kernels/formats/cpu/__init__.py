"""What Numba kernels need of each format, in a module of the format's name."""
