"""Settings: where they come from, sizes, and what is derived from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

import curkv
from curkv.cli import app
from curkv.cli.options import table
from curkv.config import OPTIONS, Option, Settings
from curkv.units import format_size, parse_size


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


@pytest.mark.parametrize(
    ("size", "text"), [(8 << 20, "8MiB"), (3 << 40, "3TiB"), (1000, "1000"), (0, "0"), (1 << 10, "1KiB")]
)
def test_sizes_are_written_as_they_are_read(size: int, text: str) -> None:
    assert format_size(size) == text
    assert parse_size(text) == size


def test_command_line_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "curkv.toml"
    file.write_text('port = 1\nhost = "file"\nkv_policy = "knorm"\n')
    monkeypatch.setenv("CURKV_PORT", "2")
    monkeypatch.setenv("CURKV_HOST", "environment")
    settings = Settings.load(file, port=3, model=None)
    server = settings.server
    assert (server.port, server.host, settings.kv.policy) == (3, "environment", "knorm")
    assert settings.model_name == OPTIONS["model"].default


OTHER_VALUES = {
    "model": "other",
    "served_model_name": "other",
    "host": "::",
    "ssl_certfile": "a.pem",
    "ssl_keyfile": "a.pem",
    "api_key_file": "keys",
    "api_key": "sesame,two",
    "cors_origin": "http://a,http://b",
    "kv_budget": "25%",
    "kv_decode_budget": "512tok",
    "kv_policy": "curdkv",
}


def other_value(option: Option) -> str:
    """A value that is not the option's default."""
    if option.name in OTHER_VALUES:
        return OTHER_VALUES[option.name]
    if "enum" in option.schema:
        return str(option.schema["enum"][-1])
    if option.schema.get("format") == "size":
        return "3MiB"
    return "true" if option.schema["type"] == "boolean" else "31"


def value(settings: Settings, option: Option) -> Any:
    return getattr(getattr(settings, option.section), option.field)


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_each_option_is_reached_by_file_environment_and_command_line(
    option: Option, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = other_value(option)
    file = tmp_path / "curkv.toml"
    file.write_text(f'{option.name} = "{text}"\n')
    wanted = value(Settings.load(file), option)
    assert wanted != value(Settings(), option)

    monkeypatch.setenv(option.variable, text)
    assert value(Settings.load(), option) == wanted
    monkeypatch.delenv(option.variable)

    seen: list[Settings] = []
    monkeypatch.setattr("curkv.server.run.serve", lambda settings: seen.append(settings) or 0)
    kind = option.schema["type"]
    values = text.split(",") if kind == "array" else [text]
    words = [option.flag] if kind == "boolean" else [word for part in values for word in (option.flag, part)]
    result = CliRunner().invoke(app, ["serve", *words])
    assert result.exit_code == 0, result.output
    assert value(seen[0], option) == wanted


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
        (["--kv-dtype", "int3"], "bfloat16"),
        (["--config", "/nowhere/at/all.toml"], "cannot read"),
    ],
)
def test_bad_settings_on_the_command_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.parametrize("key", ["", " ", "sesame,", ",sesame"])
def test_an_empty_key_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what a variable gives that is not set; an empty token would open the server to everybody."""
    monkeypatch.setenv("CURKV_API_KEY", key)
    from_environment = CliRunner().invoke(app, ["serve"])
    monkeypatch.delenv("CURKV_API_KEY")
    arguments = [word for part in key.split(",") for word in ("--api-key", part)]
    for result in (from_environment, CliRunner().invoke(app, ["serve", *arguments])):
        assert result.exit_code == 2
        assert "api_key: " in result.output and "a value is empty" in result.output


def test_help_has_every_option_with_its_variable_in_its_group() -> None:
    text = CliRunner().invoke(app, ["serve", "--help"], terminal_width=200).output
    groups = [text.index(f"\n{group}:\n") for group in dict.fromkeys(o.group for o in OPTIONS.values())]
    assert groups == sorted(groups)
    for option in OPTIONS.values():
        assert f"{option.flag} " in text
        assert option.variable in text
        assert text.index(f"\n{option.group}:\n") < text.index(f"\n  {option.flag} ")


def test_docs_have_the_table_of_options() -> None:
    """To renew it: python -c 'from curkv.cli.options import table; print(*table(), sep=chr(10))'."""
    docs = Path(__file__).parents[2] / "docs" / "operations.md"
    assert "\n".join(table()) in docs.read_text()


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"curkv {curkv.__version__}\n"


def test_policies_are_listed() -> None:
    output = CliRunner().invoke(app, ["model", "policies"]).output
    assert {"full", "curdkv", "adacurdkv"} <= {line.split()[0] for line in output.splitlines()}


def test_a_shell_completes_commands_options_and_their_values() -> None:
    def completed(words: str) -> set[str]:
        begun = {
            "_CURKV_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        return set(CliRunner().invoke(app, env=begun, prog_name="curkv").output.split())

    assert {"serve", "chat"} <= completed("curkv ")
    assert completed("curkv serve --kv-bud") == {"--kv-budget"}
    assert completed("curkv serve --weights int") == {"int8", "int4"}
