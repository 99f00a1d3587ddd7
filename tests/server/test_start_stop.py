"""How a server ends that cannot start, or is told to stop: its status, and what it says."""

from __future__ import annotations

import errno
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from curkv.cli import app
from curkv.config import Settings
from curkv.exits import Exit
from curkv.kernels import compile_cache
from curkv.models.errors import ModelError, ModelUnreachable, UnsupportedModel
from curkv.server.run import exit_of, serve

IMPORTING = """
import sys, time
from curkv.cli import app

class Slow:
    def find_spec(self, name, *_):
        if name == "curkv.server.run":
            print("there", flush=True)
            time.sleep(30)

sys.meta_path.insert(0, Slow())
app(["serve", "--port", "0", "--model", "nobody"])
"""
LOADING = """
import threading
from curkv.config import Settings
from curkv.server.run import Server, listen

def build(settings):
    print("there", flush=True)
    threading.Event().wait()

server = Server(Settings(), build)
server.run(sockets=[listen("127.0.0.1", 0)])
raise SystemExit(server.exit_status)
"""


@pytest.fixture
def no_model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--port", "70000"], Exit.BAD_OPTION, "port: "),
        (["--weights", "int3"], Exit.BAD_OPTION, "weights: 'int3' is none of auto, float32"),
        (["--config", "/nowhere/at/all.toml"], Exit.BAD_OPTION, "cannot read /nowhere/at/all.toml"),
        (["--kv-policy", "curdkv", "--kv-budget", "101%"], Exit.BAD_OPTION, "--kv-budget: "),
        (["--ssl-keyfile", "/nowhere.pem"], Exit.BAD_OPTION, "--ssl-keyfile needs --ssl-certfile"),
        (["--host", "203.0.113.1"], Exit.NO_RESOURCE, "cannot listen on 203.0.113.1"),
        (["--model", "{directory}"], Exit.BAD_MODEL, "has no config.json"),
        (["--model", "nobody"], Exit.BAD_MODEL, "no model 'nobody'"),
    ],
)
def test_a_start_that_fails_says_why_in_a_line(
    arguments: list[str], status: Exit, said: str, no_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled = [word.format(directory=no_model) for word in arguments]
    result = CliRunner().invoke(app, ["serve", "--port", "0", *filled])
    assert result.exit_code == status
    lines = result.output + caplog.text
    assert said in lines and "Traceback" not in lines


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("max_model_len exceeds the model's"), Exit.BAD_OPTION),
        (ModelError("damaged"), Exit.BAD_MODEL),
        (UnsupportedModel("an architecture"), Exit.BAD_MODEL),
        (ModelUnreachable("no network"), Exit.NO_RESOURCE),
        (OSError(errno.ENOSPC, "no space"), Exit.NO_RESOURCE),
        (MemoryError("too large a cache"), Exit.NO_RESOURCE),
        (RuntimeError("a fault of ours"), Exit.FAILED),
    ],
)
def test_what_loading_runs_into_decides_the_status(error: Exception, status: Exit) -> None:
    assert exit_of(error) == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", [IMPORTING, LOADING], ids=["importing", "loading"])
def test_a_signal_before_the_server_is_ready_ends_it_quietly(phase: str, number: signal.Signals) -> None:
    """While it drains: see test_run.py."""
    process = subprocess.Popen(
        [sys.executable, "-c", phase], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == Exit.DONE and "Traceback" not in output


def test_a_directory_for_kernels_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    with pytest.raises(OSError, match="set XDG_CACHE_HOME or NUMBA_CACHE_DIR") as caught:
        compile_cache.check()
    assert exit_of(caught.value) == Exit.NO_RESOURCE


def test_an_open_server_without_a_key_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("0.0.0.0", 0)) as other, pytest.raises(Exception, match="is taken"):
        serve(Settings(host="0.0.0.0", port=other.getsockname()[1]))
    assert "no --api-key is set" in caplog.text
    caplog.clear()
    with socket.create_server(("0.0.0.0", 0)) as other, pytest.raises(Exception, match="is taken"):
        serve(Settings(host="0.0.0.0", port=other.getsockname()[1], api_key="sesame"))
    assert "no --api-key is set" not in caplog.text
