"""How long a server takes to be ready, what memory it takes at most, and how fast it is then.

    python benchmarks/start.py make /tmp/random-1b.gguf --shape 1b
    python benchmarks/start.py times smollm2-135m-instruct /tmp/random-1b.gguf
    python benchmarks/start.py times /tmp/random-1b.gguf --no-first --weights int8 --weights int4 \\
        --peer "llama.cpp=benchmarks/peers/llama.sh serve {port} --model {model} --parallel 1 --ctx-size 4096"

curkv is started over a cache directory that has compiled kernels and fetched models but no packed weights
(`first`), and over what that has left. Prefill is that of one prompt, decode that of one stream behind 100
tokens, both the best of --repeats. `make` writes a GGUF file in the shape of Llama 3.2 with 49,152 words and
random weights of 4 bits.
"""

from __future__ import annotations

import math
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import gguf
import httpx
import numpy as np
import typer

from curkv.bench.client import seconds_for
from curkv.bench.process import curkv_serve, peak_bytes, running
from curkv.bench.script import script
from curkv.models.loading import resolve_model
from curkv.models.loading.packed import packed_directory
from curkv.tables import head, line

WORDS, GENERATED = 49152, 64


def times(
    models: list[str],
    weights: Annotated[
        list[str] | None, typer.Option(help="As for `curkv serve`; repeatable. [auto]")
    ] = None,
    peer: Annotated[list[str] | None, typer.Option(help="NAME=COMMAND; with {port} and {model}.")] = None,
    first: Annotated[bool, typer.Option(help="Start curkv without packed weights too.")] = True,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 3000,
    repeats: Annotated[int, typer.Option(help="Of each measurement of speed; 0: none.")] = 3,
) -> None:
    """Starts servers with each model, one after the other."""
    print(head(["model", "server", "start", "seconds", "peak MiB", "prefill tokens/s", "decode tokens/s"]))
    for model in models:
        directory = resolve_model(model)
        for name in weights or ["auto"]:
            options = ("--weights", name, "--kv-cache-memory", "512MiB", "--prefix-cache-memory", "0")
            command = curkv_serve("--model", model, *options, "--max-model-len", str(prompt + 2 * GENERATED))
            if first:
                for path in packed_directory().glob(f"{directory.resolve().name}-*"):
                    shutil.rmtree(path)
                row(model, f"curkv {name}", "first", command, prompt, 0)
            row(model, f"curkv {name}", "later", command, prompt, repeats)
        for text in peer or ():
            name, started_by = text.split("=", 1)
            row(model, name, "later", shlex.split(started_by.replace("{model}", model)), prompt, repeats)


def row(model: str, server: str, start: str, command: Sequence[str], prompt: int, repeats: int) -> None:
    """Starts a server, asks it for some words and for speed, and prints what came of it."""
    begun = time.perf_counter()
    with running(command) as (url, process):
        seconds = time.perf_counter() - begun
        body = {"prompt": "One two three", "max_tokens": 8}
        httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
        speeds = ["", ""]
        if repeats:
            long, short, some = (
                min(seconds_for(url, words, generated, 10 * i + number) for i in range(repeats))
                for number, (words, generated) in enumerate([(prompt, 1), (100, 1), (100, 1 + GENERATED)])
            )
            speeds = [f"{prompt / long:.0f}", f"{GENERATED / (some - short):.1f}"]
        peak = f"{peak_bytes(process.pid) / 2**20:.0f}"
    print(line([Path(model).name, server, start, f"{seconds:.2f}", peak, *speeds]), flush=True)


class Shape(StrEnum):
    """Of Llama 3.2, by its billions of parameters; of Mixtral, with a billion, of which a third runs."""

    ONE = "1b"
    THREE = "3b"
    EXPERTS = "moe"


@dataclass(frozen=True)
class Sizes:
    """Of a model in some shape; heads of keys and values are 8."""

    layers: int
    hidden: int
    heads: int
    head_dim: int
    intermediate: int = 8192
    kv_heads: int = 8
    experts: int = 0
    chosen: int = 2


SIZES = {
    Shape.ONE: Sizes(16, 2048, 32, 64),
    Shape.THREE: Sizes(28, 3072, 24, 128),
    Shape.EXPERTS: Sizes(12, 1024, 16, 64, intermediate=3584, experts=8),
}


class Kind(StrEnum):
    """Of weights."""

    Q4_0 = "q4_0"
    Q4_K = "q4_k"


def make(path: Path, shape: Shape = Shape.ONE, kind: Kind = Kind.Q4_0) -> None:
    """Writes the file."""
    known = gguf.GGUFReader(next(Path(resolve_model("smollm2-135m-instruct")).glob("*.gguf")))
    random, sizes, stored = np.random.default_rng(0), SIZES[shape], gguf.GGMLQuantizationType[kind.name]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(sizes.layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(sizes.hidden)
    writer.add_feed_forward_length(sizes.intermediate)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    for key, field in known.fields.items():
        if key.startswith("tokenizer."):
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)

    if sizes.experts:
        writer.add_expert_count(sizes.experts)
        writer.add_expert_used_count(sizes.chosen)

    def blocks(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        (*rows, columns), (together, size) = shape, gguf.GGML_QUANT_SIZES[stored]
        made = random.integers(0, 256, (math.prod(shape) // together, size), np.uint8)
        step = 0.02 / columns**0.5
        # of 4 bits with scales and lowest values of 6, both of which are 31.5 in the mean
        starts = [step] if kind is Kind.Q4_0 else [step / 31.5, 7.5 * step / 31.5]
        made[:, : 2 * len(starts)] = np.array(starts, np.float16).view(np.uint8)
        return made.reshape(*rows, -1)

    experts, ending = ([sizes.experts], "_exps") if sizes.experts else ([], "")
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    shapes = {
        "attn_q": (queries, sizes.hidden),
        "attn_k": (keys, sizes.hidden),
        "attn_v": (keys, sizes.hidden),
        "attn_output": (sizes.hidden, queries),
        f"ffn_gate{ending}": (*experts, sizes.intermediate, sizes.hidden),
        f"ffn_up{ending}": (*experts, sizes.intermediate, sizes.hidden),
        f"ffn_down{ending}": (*experts, sizes.hidden, sizes.intermediate),
    }
    writer.add_tensor("token_embd.weight", blocks(WORDS, sizes.hidden), raw_dtype=stored)
    writer.add_tensor("output_norm.weight", np.ones(sizes.hidden, np.float32))
    for layer in range(sizes.layers):
        for name, size in shapes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", blocks(*size), raw_dtype=stored)
        if sizes.experts:
            router = random.standard_normal((sizes.experts, sizes.hidden), np.float32)
            writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", router)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(sizes.hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


app = script(__doc__, times, make)

if __name__ == "__main__":
    app()
