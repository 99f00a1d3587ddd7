"""Breaks each Triton kernel in a plausible way and sees whether a test notices.

    python -m tests.kernels.triton.mutations [operation ...]

Each mutation replaces one piece of a kernel's source in a child process, which then runs the operation's
tests. The table that comes out says which test failed first; a mutation that no test notices fails the run.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import re
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Mutation:
    """`old`, once in the source of `module`, becomes `new`; then a test of `operation` must fail."""

    operation: str
    what: str
    old: str
    new: str
    module: str = ""

    @property
    def name(self) -> str:
        return self.module or f"curkv.kernels.{self.operation}.triton"

    @property
    def source(self) -> Path:
        return ROOT / (self.name.replace(".", "/") + ".py")


def util(operation: str, what: str, old: str, new: str) -> Mutation:
    return Mutation(operation, what, old, new, "curkv.kernels.triton_util")


def formats(operation: str, what: str, old: str, new: str) -> Mutation:
    return Mutation(operation, what, old, new, "curkv.kernels.formats.triton")


MUTATIONS = (
    Mutation("rope", "mask off by one head", "head < num_heads", "head <= num_heads"),
    Mutation("rope", "wrong sign", "second * cos + first * sin", "second * cos - first * sin"),
    Mutation("store_kv", "index off by one", "length - end + token", "length - end + token - 1"),
    Mutation("store_kv", "sequence off by one", "other=2147483647) <= token", "other=2147483647) < token"),
    Mutation("store_kv", "norm of half a key", "tl.sum(k1 * k1 + k2 * k2, 1)", "tl.sum(k1 * k1, 1)"),
    formats("store_kv", "rounded down", "(fraction > 0.5)", "(fraction > 1.5)"),
    Mutation("compact", "an array stays", "if array == i:", "if (array == i) & (i != 1):"),
    formats("paged_decode_attention", "not scaled", "x = x * tl.load(store", "x = x + 0 * tl.load(store"),
    Mutation("paged_decode_attention", "mask off by one", "valid = index < end", "valid = index <= end"),
    Mutation(
        "paged_decode_attention",
        "last piece of a head lost",
        "(some <= last)[:, None]",
        "(some < last)[:, None]",
    ),
    Mutation(
        "paged_prefill_attention",
        "causal mask off by one",
        "index[None, :] <= last[:, None]",
        "index[None, :] <= last[:, None] + 1",
    ),
    util("paged_decode_attention", "window off by one", "> newest - window", ">= newest - window"),
    util("paged_decode_attention", "another cap", "(2 * LOG2_E / softcap)", "(LOG2_E / softcap)"),
    Mutation(
        "paged_prefill_attention",
        "window off by one",
        "stands[None, :] >= oldest[:, None]",
        "stands[None, :] > oldest[:, None]",
    ),
    Mutation("column_sums", "window off by one", "chunk + 1 + step - window", "chunk + 2 + step - window"),
    Mutation(
        "paged_prefill_attention",
        "unmasked a block too far",
        "+ first + 1) // BLOCK_N * BLOCK_N",
        "+ first + BLOCK_N) // BLOCK_N * BLOCK_N",
    ),
    Mutation("paged_prefill_attention", "shares overlap", "tl.minimum(begin + share, end)", "end"),
    Mutation(
        "paged_prefill_attention", "last split lost", "mask = (split < splits)", "mask = (split < splits - 1)"
    ),
    Mutation(
        "paged_prefill_attention",
        "causal limit of another query",
        "last = length - chunk + step",
        "last = length - chunk + step // 2",
    ),
    Mutation(
        "column_sums", "causal mask off by one", "index[None, :] <= (length", "index[None, :] < (length"
    ),
    Mutation("column_sums", "starts a tile too late", "// TILE * TILE\n", "// TILE * TILE + TILE\n"),
    Mutation(
        "column_sums",
        "overwrites, not adds",
        'tl.atomic_add(attention + place, sums, mask=valid, sem="relaxed")',
        "tl.store(attention + place, sums, mask=valid)",
    ),
    Mutation("window_scores", "causal mask off by one", "<= own[:, None]", "< own[:, None]"),
    Mutation(
        "window_scores",
        "splits overlap",
        "tl.minimum((split + 1) * size, length)",
        "tl.minimum((split + 2) * size, length)",
    ),
    Mutation(
        "window_scores", "wrong head of the group", "(window - 1) + r // GROUP", "(window - 1) + r % GROUP"
    ),
    Mutation(
        "leverage_scores", "correction upside down", "k_sum * (window / count)", "k_sum * (count / window)"
    ),
    Mutation(
        "leverage_scores",
        "partial window on the wrong side",
        "shift = (window - length % window) % window",
        "shift = length % window",
    ),
    Mutation(
        "leverage_scores",
        "sketch without its last column",
        "pad(sketch, (0, columns - sketch.shape[1]))",
        "pad(sketch[:, :-1], (0, columns - sketch.shape[1] + 1))",
    ),
    Mutation(
        "leverage_scores", "sketch rounded to 16 bits", "for part in range(PARTS):", "for part in range(1):"
    ),
    Mutation("select", "no tie-break", "((keys == threshold) & (place <= last))", "(keys == threshold)"),
    Mutation("select", "one tie too few", "(rank <= left)", "(rank < left)"),
    Mutation(
        "select",
        "a digit's carry forgotten",
        "tl.where(digit > own, histogram, 0)",
        "tl.where(digit >= own, histogram, 0)",
    ),
    Mutation("select", "-0 below 0", "tl.where(bits == sign, 0, bits)", "tl.where(bits == 1, 0, bits)"),
    Mutation(
        "select",
        "padding starts late",
        "range(count, width, BLOCK)",
        "range(count + 1, width, BLOCK)",
    ),
    Mutation(
        "select", "a part's ties forgotten", "ties_before += tl.sum(tl.where(whole, count, 0), 0)", "pass"
    ),
    Mutation(
        "compact",
        "wrong page of the source",
        "tl.load(source + index // PAGE_SIZE",
        "tl.load(source + to // PAGE_SIZE",
    ),
    Mutation("compact", "last token stays", "mask = ((to < count)", "mask = ((to < count - 1)"),
    Mutation("rms_norm", "mean over the block", "/ SIZE + eps", "/ BLOCK + eps"),
    Mutation("silu_mul", "wrong stride", "row * stride + SIZE + i", "row * stride + BLOCK + i"),
    util(
        "paged_prefill_attention",
        "tile of the wrong sequence",
        "starts // TILE + b <= tile",
        "starts // TILE + b < tile",
    ),
    formats("paged_decode_attention", "running sum not scaled", "total = total * decay", "total = total"),
    util(
        "paged_decode_attention",
        "bfloat16 bits multiplied",
        "INTERPRETED and a.dtype == tl.bfloat16",
        "INTERPRETED and a.dtype == tl.float64",
    ),
    util("leverage_scores", "offset in the page forgotten", "PAGE_SIZE + index % PAGE_SIZE", "PAGE_SIZE"),
)


def run(mutation: Mutation) -> str:
    """First failing test under a mutation, "" if none, found in a child process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.write(writer, _first_failure(mutation).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        failure = pipe.read()
    _, status = os.waitpid(child, 0)
    return failure if status == 0 else "crash: memory out of bounds"


def _first_failure(mutation: Mutation) -> str:
    import pytest

    text = mutation.source.read_text().replace(mutation.old, mutation.new)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()) as output:
        path = Path(folder) / "mutated.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(mutation.name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[mutation.name] = module
        package, _, leaf = mutation.name.rpartition(".")
        setattr(importlib.import_module(package), leaf, module)
        spec.loader.exec_module(module)
        tests = ROOT / "tests" / "kernels" / "triton" / f"test_{mutation.operation}.py"
        pytest.main([str(tests), "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore"])
    found = re.search(r"(?:FAILED|ERROR) \S+::(.*?)(?: - |\n)", output.getvalue())
    return found[1] if found else ""


def main() -> int:
    os.environ["TRITON_INTERPRET"] = "1"
    os.chdir(ROOT)
    import pytest  # noqa: F401
    import torch
    import triton.language  # noqa: F401

    torch.set_num_threads(1)
    missed = 0
    print("| kernel | mutation | noticed by | seconds |\n|---|---|---|---|")
    wanted = [m for m in MUTATIONS if len(sys.argv) < 2 or m.operation in sys.argv]
    for mutation in wanted:
        start = time.perf_counter()
        failure = run(mutation)
        missed += not failure
        where = mutation.name.removeprefix("curkv.kernels.").removesuffix(".triton")
        print(
            f"| {where} | {mutation.what} | {failure or '**nothing**'} | {time.perf_counter() - start:.0f} |",
            flush=True,
        )
    print(f"{len(wanted)} mutations, {missed} not noticed")
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
