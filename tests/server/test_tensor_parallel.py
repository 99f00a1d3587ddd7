"""A server whose model runs in two processes: it answers, and it ends when one of them does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx
import psutil

from curkv.exits import Exit
from tests.tensor_parallel import prompt, write_model


def test_two_processes_answer_and_end_together(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    flags = "--weights float32 --tensor-parallel 2 --threads 1 --kv-cache-memory 8MiB --port 0"
    command = (sys.executable, "-m", "curkv.cli", "serve", "--model", str(model), *flags.split())
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout is not None
            url = next(found[1] for line in server.stdout if (found := re.search(r"at (http://\S+) ", line)))
            asked = {"prompt": prompt(100, 1), "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            evicting = {"X-KV-Policy": "adasnapkv", "X-KV-Budget": "25%"}
            with httpx.Client(base_url=url, timeout=30) as http:
                answer = http.post("/v1/completions", json=asked, headers=evicting).json()
                assert answer["usage"]["completion_tokens"] == 8
                assert answer["usage"]["kv"]["kept_tokens"] == 25
                metrics = http.get("/metrics").text
                [sums] = re.findall(r'exchanged_bytes_total\{content="sums",\S+ (\S+)', metrics)
                assert float(sums) > 0
                [follower] = psutil.Process(server.pid).children()
                asked |= {"max_tokens": 400, "stream": True}
                with http.stream("POST", "/v1/completions", json=asked) as news:
                    lines = news.iter_lines()
                    assert next(lines).startswith("data: ")
                    follower.kill()
                    assert any('"error"' in line for line in lines)
            assert server.wait(30) == Exit.ENGINE_BROKEN
            said = server.stdout.read()
            assert "the process of rank 1 has ended with status -9" in said
            assert "the server stops: its engine is dead" in said
        finally:
            server.kill()
