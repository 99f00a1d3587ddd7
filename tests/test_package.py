"""What is published: a wheel, made from the source distribution, in an environment where no checkout is."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import curkv

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", directory, ROOT, cwd=directory)
    (wheel,) = directory.glob("*.whl")
    return wheel


def test_the_wheel_has_all_sources_and_the_page(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("curkv/")}
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "curkv", cwd=ROOT).split()
    assert packed == {name for name in tracked if (ROOT / name).exists()}


def test_the_wheel_runs_where_no_checkout_is(wheel: Path, tmp_path: Path) -> None:
    """Its dependencies are those of the environment of the tests; `pip check` finds none missing."""
    builder = venv.EnvBuilder(with_pip=False)
    builder.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    paths = sysconfig.get_paths(vars={"base": str(tmp_path / "env"), "platbase": str(tmp_path / "env")})
    packages = Path(paths["purelib"])
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", packages, wheel, cwd=tmp_path)
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    pages = "asyncio.run(r.page()), asyncio.run(r.conversation())"
    script = f"import asyncio, curkv.server.page.router as r; {pages}; print(r.FOLDER)"
    where = run(python, "-c", script, cwd=tmp_path)
    folder = Path(where.strip())
    assert folder.is_relative_to(packages) and (folder / "pages/index.html").exists()
    assert run(python, "-m", "curkv.cli", "--version", cwd=tmp_path) == f"curkv {curkv.__version__}\n"
    assert "No broken requirements" in run(python, "-m", "pip", "check", cwd=tmp_path)
