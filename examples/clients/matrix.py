#!/usr/bin/env python3
"""Runs every client against a server and prints what works as Markdown.

    curkv serve --weights int8 &
    python examples/clients/matrix.py [--url http://127.0.0.1:8000] [CLIENT ...]

Needs uv, which gives every script in Python the packages that it names, and, for those in Node, `npm ci` in
this directory. CLIENT is the stem of a script; without any, all are run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from cases import CASES

HERE = Path(__file__).parent
HELPERS = {"cases", "matrix", "ai_sdk_cases"}
MARKS = {"yes": "yes", "no": "**no**", "not ours": "(no)"}
SECONDS = 900


def scripts(named: list[str]) -> list[Path]:
    """The scripts of clients, Python's before Node's."""
    found = sorted(path for kind in ("*.py", "*.mjs") for path in HERE.glob(kind) if path.stem not in HELPERS)
    return [
        path
        for path in sorted(found, key=lambda path: path.suffix, reverse=True)
        if not named or path.stem in named
    ]


def run(script: Path, url: str) -> list[dict[str, str]]:
    """What a client's script found; a script that says nothing is a case that failed."""
    runner = ["node"] if script.suffix == ".mjs" else ["uv", "run", "--quiet", "--script"]
    done = subprocess.run([*runner, script, url], capture_output=True, text=True, timeout=SECONDS)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"client"')]
    if not lines:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        lines = [{"client": script.stem, "version": "", "case": CASES[0], "result": "no", "reason": said}]
    return lines


def table(found: list[dict[str, str]]) -> str:
    """Markdown: a row for each client, and the reasons below."""
    rows: dict[str, dict[str, dict[str, str]]] = {}
    for line in found:
        rows.setdefault(f"{line['client']} {line['version']}".strip(), {})[line["case"]] = line
    lines = [f"| client | {' | '.join(CASES)} |", "|---" * (len(CASES) + 1) + "|"]
    for client, cases in rows.items():
        marks = (MARKS[cases[case]["result"]] if case in cases else "" for case in CASES)
        lines.append(f"| {client} | {' | '.join(marks)} |")
    for line in found:
        if line["reason"]:
            lines += ["", f"- {line['client']}, {line['case']}: {line['result']}. {line['reason']}"]
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("client", nargs="*")
    given = parser.parse_args()
    if shutil.which("uv") is None:
        sys.exit("uv is needed: pip install uv")
    found = []
    for script in scripts(given.client):
        print(script.name, file=sys.stderr)
        found += run(script, given.url)
    print(table(found))


if __name__ == "__main__":
    main()
