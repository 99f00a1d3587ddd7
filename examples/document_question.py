"""The same question about a long document with several policies, through the `openai` client.

make serve                                   # in another terminal
.venv/bin/pip install openai
.venv/bin/python examples/document_question.py [--url http://127.0.0.1:8000]
"""

from __future__ import annotations

import argparse
import threading
import urllib.request
from pydoc_data.topics import topics

from openai import OpenAI

CHOICES = {
    "full": {"X-KV-Policy": "full"},
    "curdkv 50%": {"X-KV-Policy": "curdkv", "X-KV-Budget": "50%"},
    "curdkv 25%": {"X-KV-Policy": "curdkv", "X-KV-Budget": "25%"},
    "adacurdkv 25%": {"X-KV-Policy": "adacurdkv", "X-KV-Budget": "25%"},
    "snapcur 12.5%": {"X-KV-Policy": "snapcur", "X-KV-Budget": "12.5%"},
}
SHOWN = ("num_requests_running", "kv_cache_used_bytes", "kv_pages_freed_total", "kv_tokens_evicted_total")


def main() -> None:
    """Asks, and prints answers, `usage.kv` and metrics before, during and after."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    url = parser.parse_args().url
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
    model = client.models.list().data[0].id
    text = topics["assignment"][:4500]
    document = text + "\n\nThe special magic number for Lisbon is 7302945.\n\n" + topics["try"][:3300]
    prompt = document + "\n\nQuestion: What is the special magic number for Lisbon?\nAnswer: The number is"

    print("before:", _metrics(url))
    for name, headers in CHOICES.items():
        timer = threading.Timer(1.5, lambda: print("  during:", _metrics(url)))
        timer.start()
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=16, temperature=0, extra_headers=headers
        )
        timer.join()
        print(f"{name}: {answer.choices[0].text!r}")
        print(f"  {answer.usage.prompt_tokens} prompt tokens, kv: {answer.usage.kv}")
    print("after:", _metrics(url))


def _metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics") as response:
        lines = response.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        name = line.removeprefix("curkv:").split("{")[0]
        if name in SHOWN:
            found[name] = found.get(name, 0) + float(line.rsplit(" ", 1)[1])
    return found


if __name__ == "__main__":
    main()
