"""Writes a model as transformers does, in bfloat16, for servers that read no GGUF file, or not this one.

python benchmarks/peers/checkpoint.py smollm2-135m-instruct /tmp/smollm2
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from curkv.bench.baseline import load
from curkv.bench.script import script
from curkv.models.loading import resolve_model


def write(
    model: Annotated[str, typer.Argument(help="Built-in name, directory, Hub id or GGUF file.")],
    directory: Annotated[Path, typer.Argument(help="To write to.")],
) -> None:
    """Writes weights, configuration and tokenizer."""
    source = resolve_model(model)
    found: Any = load(source)  # whose types are wrong in places
    found.to(torch.bfloat16).save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, directory / file)


app = script(__doc__, write)

if __name__ == "__main__":
    app()
