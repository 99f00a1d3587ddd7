# /// script
# dependencies = ["llm==0.36"]
# ///
"""The llm command line: --schema, -T and --no-stream."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from cases import BASE, MODEL, PERSON, QUESTION, check, main

HOME = Path(tempfile.mkdtemp())
HOME.joinpath("extra-openai-models.yaml").write_text(
    f"- model_id: here\n  model_name: {MODEL}\n  api_base: {BASE}\n"
    "  api_key_name: here\n  supports_schema: true\n  supports_tools: true\n"
)
HOME.joinpath("keys.json").write_text('{"here": "none"}')


def llm(*words, prompt=QUESTION):
    command = [
        sys.executable,
        "-m",
        "llm",
        "-m",
        "here",
        *words,
        "-o",
        "max_tokens",
        "200",
        "-o",
        "temperature",
        "0",
        prompt,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"LLM_USER_PATH": str(HOME)}
    )
    check(done.returncode == 0, done.stderr)
    return done.stdout


main(
    "llm CLI",
    "llm",
    {
        "chat": lambda: check(llm("--no-stream"), "no text"),
        "stream": lambda: check(llm(), "no text"),
        "json schema": lambda: check("name" in json.loads(llm("--schema", json.dumps(PERSON))), "no name"),
        "tools auto": lambda: llm("-T", "llm_time", "--chain-limit", "3", "--no-stream"),
        "tools streamed": lambda: llm("-T", "llm_time", "--chain-limit", "3"),
    },
)
