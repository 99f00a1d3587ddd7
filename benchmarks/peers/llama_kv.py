"""What llama.cpp's formats of keys and values cost it in perplexity, and how fast it decodes with them.

    python3 -m venv DIR && DIR/bin/pip install xllamacpp==2026.10.11549
    PYTHONPATH=$(echo DIR/lib/python3*/site-packages) python benchmarks/peers/llama_kv.py OUTPUT

Windows of text as in `kv_dtypes.py`: the first half is computed as a prompt, and each token of the second
half is predicted behind all before it, as if it had been generated. A token that is not among the
likeliest is left out. Ratios are to llama.cpp's own f16. OUTPUT gets a line per type, and the table is
printed over all of its lines.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from curkv.bench.script import Model, script
from curkv.evaluation.corpora import load_corpus
from curkv.evaluation.perplexity import token_windows
from curkv.models.loading import load_tokenizer, resolve_model
from curkv.models.loading.built_in import DEFAULT_MODEL
from curkv.tables import table

TYPES = ("f16", "q8_0", "q8_0/q4_0", "q5_1", "q4_0")
BITS = {"f16": 16, "q8_0": 8.5, "q5_1": 6, "q4_0": 4.5}
"""Of a channel, with the scales of its block."""
LIKELIEST = 1000
DECODED = 64


class Llama:
    """A server of llama.cpp in this process."""

    def __init__(self, model: Path, keys: str, values: str, context: int) -> None:
        """Loads the model."""
        x: Any = importlib.import_module("xllamacpp")
        params = x.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.warmup = context, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
        for name, kind in (("cache_type_k", keys), ("cache_type_v", values)):
            setattr(params, name, getattr(x.ggml_type, f"GGML_TYPE_{kind.upper()}"))
        params.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._server = x.Server(params)

    def ask(self, ids: list[int], **options: Any) -> dict[str, Any]:
        """Completes token ids."""
        request = {"prompt": ids, "cache_prompt": True, "temperature": 0, "ignore_eos": True, **options}
        answer = self._server.handle_completions(request)
        found: dict[str, Any] = json.loads(answer) if isinstance(answer, str | bytes) else answer
        return found


def likelihoods(llama: Llama, ids: list[int]) -> list[float | None]:
    """Log-probability of each token of the second half of a window; None for an unlikely one."""
    found: list[float | None] = []
    for i in range(len(ids) // 2, len(ids)):
        answer = llama.ask(ids[:i], n_predict=1, n_probs=LIKELIEST)
        likely = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found.append(next((one["logprob"] for one in likely if one["id"] == ids[i]), None))
    return found


def measure(
    output: Annotated[Path, typer.Argument(help="JSON lines, added to.")],
    model: Model = DEFAULT_MODEL,
    types: Annotated[list[str] | None, typer.Option(help="Of keys and values, or K/V; all of them.")] = None,
    windows: int = 1,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    context: Annotated[int, typer.Option(help="Tokens behind which decoding is timed.")] = 4000,
) -> None:
    """Measures and prints."""
    directory = resolve_model(model)
    tokenizer = load_tokenizer(directory)
    texts = {name: load_corpus(name) for name in ("documentation", "mansfield-park")}
    for kind in types or TYPES:
        keys, _, values = kind.partition("/")
        llama = Llama(next(directory.glob("*.gguf")), keys, values or keys, context + 2 * DECODED)
        scores = {
            name: [
                likelihoods(llama, ids.tolist()) for ids in token_windows(tokenizer, text, length, windows)
            ]
            for name, text in texts.items()
        }
        long = token_windows(tokenizer, texts["documentation"], context, 1)[0].tolist()
        speed = llama.ask(long, n_predict=DECODED)["timings"]["predicted_per_second"]
        with output.open("a") as file:
            file.write(json.dumps({"type": kind, "scores": scores, "tokens_per_second": speed}) + "\n")
    report([json.loads(line) for line in output.read_text().splitlines()])


def report(results: list[dict[str, Any]]) -> None:
    """Prints bits of a channel, perplexity as a ratio to f16's, and the speed of decoding."""
    exact = next(result for result in results if result["type"] == "f16")["scores"]
    cells = []
    for result in results:
        keys, _, values = result["type"].partition("/")
        ratios = []
        for name, windows in result["scores"].items():
            pairs = [
                (a, b)
                for reference, found in zip(exact[name], windows, strict=True)
                for a, b in zip(reference, found, strict=True)
                if a is not None and b is not None
            ]
            ratios.append(f"{math.exp(sum(a - b for a, b in pairs) / len(pairs)):.4f}")
        bits = (BITS[keys] + BITS[values or keys]) / 2
        cells.append([result["type"], f"{bits:.2f}", *ratios, f"{result['tokens_per_second']:.1f}"])
    texts = [f"perplexity ratio, {name}" for name in exact]
    print(table(["K and V", "bits of a channel", *texts, "tokens/s"], cells))


app = script(__doc__, measure)

if __name__ == "__main__":
    app()
