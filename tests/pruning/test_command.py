import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from curkv.cli.prune import app
from tests.pruning.conftest import save_model

cli = typer.Typer()
cli.add_typer(app, name="prune")


@cli.command()
def other() -> None:
    pass


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli, ["prune", *map(str, args)])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def test_a_model_is_pruned_and_the_result_stated(model: Path, tmp_path: Path) -> None:
    result = invoke(model, "--method", "random", "--ratio", "0.5", "--align", "1", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "32 of 64 MLP rows" in result.output and "peak memory" in result.output
    assert json.loads((tmp_path / "out/config.json").read_text())["intermediate_size"] == 32
    again = invoke(
        tmp_path / "out", "--method", "magnitude", "--ratio", 0.5, "--align", 1, "-o", tmp_path / "b"
    )
    assert again.exit_code == 0 and "already pruned (random, 50.0%" in again.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "1.5"], "outside (0, 0.9]"),
        (["--ratio", "0.25", "--align", "128"], "smaller --align"),
        (["--method", "random", "--policy", "p"], "--policy belongs to --method prunenet"),
        (["--method", "random", "--text", "t"], "--text belongs to --method self-calibrated"),
        (["--method", "prunenet", "--no-compensate"], "--compensate belongs to --method self-calibrated"),
        (["--method", "random", "--sequences", "9"], "--sequences belongs to --method self-calibrated"),
        (["--method", "random", "--distil-steps", "9"], "--distil-steps belongs to --method self-calibrated"),
        (["--text", "t", "--sequences", "9"], "--text is text written before"),
        (["--align", "1", "--method", "prunenet", "--policy", "missing"], "no PruneNet policy"),
        (["--align", "1", "--text", "missing"], "no text of this model"),
    ],
)
def test_bad_input_is_told_in_a_line(model: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = invoke(model, "-o", tmp_path / "out", *options)
    assert result.exit_code == 1 and message in result.output
    assert not (tmp_path / "out").exists()


def test_help_shows_the_options_of_the_main_command() -> None:
    result = invoke("--help")
    assert result.exit_code == 0 and "--ratio" in result.output and "prune report" in result.output
