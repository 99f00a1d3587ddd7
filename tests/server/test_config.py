"""Settings: where they come from, and sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

import curkv
from curkv.cli import app
from curkv.config import Settings, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 << 30),
        ("512 MiB", 512 << 20),
        ("1.5G", 1_500_000_000),
        ("100", 100),
        ("8mb", 8_000_000),
        ("1kib", 1024),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2 gigs", "1e9", "nan", "2GiBiB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_command_line_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "curkv.toml"
    file.write_text('port = 1\nhost = "file"\nkv_policy = "knorm"\n')
    monkeypatch.setenv("CURKV_PORT", "2")
    monkeypatch.setenv("CURKV_HOST", "environment")
    settings = Settings.load(file, port=3, model=None)
    assert (settings.port, settings.host, settings.kv_policy) == (3, "environment", "knorm")
    assert settings.model_name == Settings.model_fields["model"].default


def test_unknown_setting_in_file(tmp_path: Path) -> None:
    file = tmp_path / "curkv.toml"
    file.write_text("prot = 1\n")
    with pytest.raises(ValidationError, match="prot"):
        Settings.load(file)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "port"),
        (["--page-size", "0"], "page_size"),
        (["--kv-cache-memory", "lots"], "is not a size"),
        (["--kv-dtype", "int4"], "bfloat16"),
        (["--config", "/nowhere/at/all.toml"], "cannot read"),
    ],
)
def test_bad_settings_on_the_command_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert said in result.output


def test_command_line_covers_every_setting() -> None:
    text = CliRunner().invoke(app, ["serve", "--help"], terminal_width=200).output
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')} " in text


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"curkv {curkv.__version__}\n"


def test_policies_are_listed() -> None:
    output = CliRunner().invoke(app, ["model", "policies"]).output
    assert {"full", "curdkv", "adacurdkv"} <= {line.split()[0] for line in output.splitlines()}
