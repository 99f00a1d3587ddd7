"""Root-mean-square normalisation, with an optional residual addition before it."""
