"""OpenVINO GenAI's continuous batching pipeline behind what `curkv bench serve` speaks of the OpenAI API.

`openvino.sh` makes its environment and starts it. One thread steps the pipeline; each connection has another,
which sends the tokens of its request as they come. Its
environment has nothing of curkv, not even its command line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai


class Engine:
    """Steps the pipeline while it has requests, and hands out the tokens of each as they come."""

    def __init__(self, pipeline: genai.ContinuousBatchingPipeline) -> None:
        self.tokenizer = pipeline.get_tokenizer()
        self._pipeline = pipeline
        self._arrivals: queue.Queue[tuple[np.ndarray, int, queue.Queue[list[int] | None]]] = queue.Queue()
        self._ids = itertools.count()
        threading.Thread(target=self._run, daemon=True).start()

    def generate(self, prompt: list[int], new_tokens: int) -> queue.Queue[list[int] | None]:
        """Starts a greedy request that ignores the end-of-text token; None follows its last tokens."""
        tokens: queue.Queue[list[int] | None] = queue.Queue()
        self._arrivals.put((np.array([prompt], dtype=np.int64), new_tokens, tokens))
        return tokens

    def _run(self) -> None:
        running: list[tuple[Any, queue.Queue[list[int] | None]]] = []
        while True:
            while not running or not self._arrivals.empty():
                prompt, new_tokens, tokens = self._arrivals.get()
                config = genai.GenerationConfig(
                    max_new_tokens=new_tokens, min_new_tokens=new_tokens, ignore_eos=True, do_sample=False
                )
                handle = self._pipeline.add_request(next(self._ids), openvino.Tensor(prompt), config)
                running.append((handle, tokens))
            self._pipeline.step()
            for handle, tokens in running:
                if handle.can_read():
                    for output in handle.read().values():
                        tokens.put(output.generated_ids)
                if handle.get_status() != genai.GenerationStatus.RUNNING:
                    tokens.put(None)
            running = [pair for pair in running if pair[0].get_status() == genai.GenerationStatus.RUNNING]


class Handler(BaseHTTPRequestHandler):
    """GET /health, GET /v1/models, and POST /v1/completions as a stream."""

    engine: Engine

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "openvino", "owned_by": "openvino"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt, new_tokens = body["prompt"], body["max_tokens"]
        if isinstance(prompt, str):
            prompt = self.engine.tokenizer.encode(prompt).input_ids.data[0].tolist()
        tokens = self.engine.generate(prompt, new_tokens)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        while (ids := tokens.get()) is not None:
            for token in ids:
                self._event({"choices": [{"index": 0, "text": self.engine.tokenizer.decode([token])}]})
        usage = {"prompt_tokens": len(prompt), "completion_tokens": new_tokens}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def _answer(self, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the driver's output is a table."""


def main() -> None:
    """Serves until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="directory of an exported model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--kv-precision", default="u8", help="u8, f16, bf16 or f32")
    parser.add_argument("--max-batched-tokens", type=int, default=256, help="tokens of a step")
    parser.add_argument("--prefix-caching", action="store_true")
    parser.add_argument("--evict-to", type=int, help="tokens that cache eviction keeps of a sequence")
    args = parser.parse_args()
    config = genai.SchedulerConfig()
    config.max_num_batched_tokens = args.max_batched_tokens
    config.enable_prefix_caching = args.prefix_caching
    if args.evict_to:
        config.use_cache_eviction = True
        config.cache_eviction_config = genai.CacheEvictionConfig(
            start_size=32,
            recent_size=128,
            max_cache_size=args.evict_to,
            aggregation_mode=genai.AggregationMode.NORM_SUM,
        )
    started = time.perf_counter()
    properties = {"KV_CACHE_PRECISION": args.kv_precision}
    pipeline = genai.ContinuousBatchingPipeline(args.model, config, "CPU", properties)
    Handler.engine = Engine(pipeline)
    print(
        f"openvino-genai {genai.get_version()}, ready after {time.perf_counter() - started:.1f} s", flush=True
    )
    ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
