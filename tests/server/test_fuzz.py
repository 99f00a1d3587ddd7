"""A short run of schemathesis against the OpenAPI document; the long one, against a server of your own:

    schemathesis run http://127.0.0.1:8000/openapi.json --max-examples 40 --checks \
not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("schemathesis")

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


def test_no_server_error_and_no_undocumented_answer(url: str, tmp_path: Path) -> None:
    options = "--max-examples 3 --seed 1 --no-shrink --suppress-health-check all --phases examples,fuzzing"
    run = subprocess.run(
        [
            *(Path(sys.executable).with_name("schemathesis"), "--no-color", "run", f"{url}/openapi.json"),
            *("--checks", ",".join(CHECKS)),
            *options.split(),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
