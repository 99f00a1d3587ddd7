"""Writes the documents of the two tasks beside this file; needs `curkv[eval]`.

    .venv/bin/python examples/lm_eval/make_data.py --length 900 --count 10

Then, with lm-eval 0.4.13 and transformers (for the tokenizer) in an environment of their own:

    lm-eval run --model local-completions --include_path examples/lm_eval --tasks curkv_capitals,curkv_niah \
      --batch_size 4 \
      --model_args model=smollm2-135m-instruct,base_url=http://127.0.0.1:8000/v1/completions,\
tokenizer=$HOME/.cache/curkv/models/smollm2-135m-instruct-v1,tokenized_requests=True,num_concurrent=4

A policy for all requests is the server's default: `curkv serve --kv-policy snapkv --kv-budget 25%`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from curkv.evaluation.tasks import make_sample
from curkv.evaluation.tasks.base import Recipe
from curkv.models.loading import load_tokenizer, resolve_model

HERE = Path(__file__).parent
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Spain": "Madrid",
    "Russia": "Moscow",
    "Germany": "Berlin",
    "England": "London",
    "Greece": "Athens",
    "Cuba": "Havana",
}


def main() -> None:
    """Writes `niah.jsonl` and `capitals.jsonl`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=900, help="most tokens of a prompt")
    parser.add_argument("--count", type=int, default=10, help="documents of niah_single_1")
    options = parser.parse_args()
    tokenizer = load_tokenizer(resolve_model("smollm2-135m-instruct"))
    samples = (
        make_sample(
            Recipe("niah_single_1", options.length, seed, "none"), lambda text: len(tokenizer.encode(text))
        )
        for seed in range(options.count)
    )
    _write("niah.jsonl", [{"prompt": s.context + s.question, "answer": s.answers[0]} for s in samples])
    cities = list(CAPITALS.values())
    _write(
        "capitals.jsonl",
        [
            {"question": f"The capital of {country} is", "choices": cities, "answer": cities.index(city)}
            for country, city in CAPITALS.items()
        ],
    )


def _write(name: str, documents: list[dict[str, object]]) -> None:
    (HERE / name).write_text("".join(json.dumps(document) + "\n" for document in documents))


if __name__ == "__main__":
    main()
