"""Ground floor of the CPU kernels: what Numba lacks, as intrinsics, and how kernels are run.

| module | holds |
|---|---|
| `features` | what this machine's instructions can do |
| `jit` | the decorators that make kernels |
| `llvm` | emitting instructions: types, 16-bit floats, address arithmetic |
| `lanes` | eight float32 in a register |
| `memory` | loads, stores and addresses by `kind` |
| `vectors` | keys and values in whatever format they lie |
| `softmax` | powers of two, and rows of scores |
| `rows` | queries against keys and weights against values, of decode attention |
| `tiles` | micro-kernels of matrix products |
| `quads` | the micro-kernel of products of bytes in fours |
| `panels` | packing keys and values for a micro-kernel |
| `cores` | how many cores there are for this process |
| `waiting` | words that threads share, and sleeping until one changes |
| `threads` | the threads that work through lists of launches |
| `workers` | launching on all threads, and recording launches |
"""
