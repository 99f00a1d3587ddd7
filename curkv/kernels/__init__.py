"""Cache operations on tensors: a torch reference and a Numba CPU kernel for each."""
