"""How long a server takes to be ready, and what memory it takes at most: first start and later ones.

    python benchmarks/start.py smollm2-135m-instruct gemma-3-270m /tmp/random-1b.gguf
    python benchmarks/start.py make /tmp/random-1b.gguf

Each model is started over a cache directory that has compiled kernels and fetched models but no packed
weights, and again over what the first start has left. `make` writes a GGUF file in the shape of Llama 3.2 1B
with 49,152 words and random Q4_0 weights.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated

import gguf
import httpx
import numpy as np
import typer

from curkv.bench.process import curkv_serve, peak_bytes, running
from curkv.bench.script import script
from curkv.models.loading import resolve_model
from curkv.models.loading.packed import packed_directory
from curkv.tables import head, line

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, WORDS = 16, 2048, 8192, 32, 8, 64, 49152


def times(
    models: list[str],
    weights: Annotated[str, typer.Option(help="As for `curkv serve`.")] = "auto",
    runs: Annotated[int, typer.Option(help="Starts after the first one.")] = 2,
    words: Annotated[int, typer.Option(help="Tokens generated before memory is read.")] = 8,
) -> None:
    """Starts a server with each model, several times."""
    print(head(["model", "weights", "start", "seconds", "peak MiB"]))
    for model in models:
        directory = resolve_model(model)
        for path in packed_directory().glob(f"{directory.resolve().name}-*"):
            shutil.rmtree(path)
        for number in range(runs + 1):
            seconds, peak = started(model, weights, words)
            name = "first" if number == 0 else "later"
            print(
                line([Path(model).name, weights, name, f"{seconds:.2f}", f"{peak / 2**20:.0f}"]), flush=True
            )


def started(model: str, weights: str, words: int) -> tuple[float, int]:
    """Starts a server and asks it for some words; returns seconds to its being ready, and peak bytes."""
    begun = time.perf_counter()
    options = ("--weights", weights, "--kv-cache-memory", "256MiB", "--max-model-len", "512")
    with running(curkv_serve("--model", model, *options)) as (url, process):
        seconds = time.perf_counter() - begun
        body = {"prompt": "One two three", "max_tokens": words}
        httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
        return seconds, peak_bytes(process.pid)


def make(path: Path) -> None:
    """Writes the file."""
    known = gguf.GGUFReader(next(Path(resolve_model("smollm2-135m-instruct")).glob("*.gguf")))
    random, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q4_0
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    for key, field in known.fields.items():
        if key.startswith("tokenizer."):
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)

    def blocks(rows: int, columns: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
        made = random.integers(0, 256, (rows * columns // 32, 18), np.uint8)
        made[:, :2] = np.array([0.02 / columns**0.5], np.float16).view(np.uint8)
        return made.reshape(rows, -1)

    shapes = {
        "attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_gate": (INTERMEDIATE, HIDDEN),
        "ffn_up": (INTERMEDIATE, HIDDEN),
        "ffn_down": (HIDDEN, INTERMEDIATE),
    }
    writer.add_tensor("token_embd.weight", blocks(WORDS, HIDDEN), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", blocks(*shape), raw_dtype=kind)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


app = script(__doc__, times, make)

if __name__ == "__main__":
    app()
