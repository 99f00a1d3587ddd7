"""Runs the Dockerfile's steps without Docker: each stage in a Debian root of its own, then the server in it.

    python docker/clean_root.py --target cpu --folder /var/tmp/curkv-root

Needs root, `debootstrap` and gigabytes of disk. A minimal Debian bookworm with its Python 3.11 stands in for
`python:3.11-slim-bookworm`. Instructions are read as far as this Dockerfile uses them. It shows that
the steps work and that the result starts as its user and gets healthy, and nothing about layers or networks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
CONTEXT = HERE.parent
BASE_PACKAGES = "python3,python3-venv,ca-certificates"
START_SECONDS = 1200


@dataclass
class Stage:
    """One stage of the Dockerfile, built as far as its instructions have been run.

    Attributes:
        root: its file system.
        env, args: variables of ENV and ARG.
        folder: WORKDIR.
        user: USER, a number; 0 until it is set.
        healthcheck, entrypoint, command: in their exec form.
    """

    root: Path
    env: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    )
    args: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: int = 0
    healthcheck: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def start(self, command: list[str], extra: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Starts a command inside the root, as the stage's user, in its folder."""
        shell = f"cd {shlex.quote(self.folder)} && exec {shlex.join(command)}"
        inside = ["chroot", f"--userspec={self.user}:{self.user}", str(self.root), "/bin/sh", "-c", shell]
        return subprocess.Popen(inside, env={**extra, **self.env})

    def run(self, command: list[str], extra: Mapping[str, str]) -> int:
        """Runs a command inside the root; gives its status."""
        return self.start(command, extra).wait()


def main() -> None:
    """Builds the target's stages, starts its command and waits for its health check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--folder", type=Path, required=True, help="where the roots are made")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--copy", action="append", default=[], type=Path, help="host path that the steps need"
    )
    arguments = parser.parse_args()
    given = dict(item.split("=", 1) for item in arguments.build_arg)
    base = debian(arguments.folder / "debian", arguments.copy)
    stage = build(arguments.target, base, arguments.folder, given)
    size = subprocess.check_output(["du", "-sh", "-x", stage.root], text=True).split()[0]
    print(f"ok  every step of {arguments.target} ran; its root is {size}", flush=True)
    check_start(stage)


def debian(root: Path, copies: list[Path]) -> Path:
    """A minimal Debian with Python, as the base image has it."""
    if not root.exists():
        options = ["--variant=minbase", f"--include={BASE_PACKAGES}"]
        subprocess.run(["debootstrap", *options, "bookworm", root], check=True, stdout=subprocess.DEVNULL)
        (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    for path in [Path("/etc/resolv.conf"), *copies]:
        target = root / path.relative_to("/")
        if path.is_dir():
            shutil.copytree(path, target, symlinks=True, dirs_exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return root


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, rest), comments dropped and continued lines joined."""
    lines = [
        line for line in (HERE / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")
    ]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (name, rest.strip())
        for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def build(target: str, base: Path, folder: Path, given: Mapping[str, str]) -> Stage:
    """Builds `target` and the stages it needs, each once."""
    stages: dict[str, list[tuple[str, str]]] = {}
    bases: dict[str, str] = {}
    for name, rest in instructions():
        if name == "FROM":
            bases[(stage := rest.split(" AS ")[1])] = rest.split(" AS ")[0]
            stages[stage] = []
        elif stages:
            stages[stage].append((name, rest))
    built: dict[str, Stage] = {}

    def make(name: str) -> Stage:
        if name in built:
            return built[name]
        parent = make(bases[name]) if bases[name] in stages else Stage(base)
        made = Stage(folder / name, dict(parent.env), {}, parent.folder, parent.user)
        made.healthcheck, made.entrypoint, made.command = (
            parent.healthcheck,
            parent.entrypoint,
            parent.command,
        )
        shutil.rmtree(made.root, ignore_errors=True)
        subprocess.run(["cp", "-a", "--reflink=auto", parent.root, made.root], check=True)
        for step, rest in stages[name]:
            print(f"[{name}] {step} {rest}", flush=True)
            if (source := re.match(r"--from=(\S+) ", rest)) is not None:
                make(source[1])
            apply(made, step, rest, built, given)
        return built.setdefault(name, made)

    return make(target)


def apply(stage: Stage, name: str, rest: str, built: Mapping[str, Stage], given: Mapping[str, str]) -> None:
    """Carries out one instruction.

    Raises:
        RuntimeError: a RUN failed, or the instruction is not known here.
    """
    network = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.lower().endswith("_proxy")}
    match name:
        case "ARG":
            key, _, default = rest.partition("=")
            stage.args[key] = given.get(key, default)
        case "ENV":
            for word in shlex.split(rest):
                key, _, value = word.partition("=")
                stage.env[key] = value.replace("$PATH", stage.env["PATH"])
        case "WORKDIR":
            stage.folder = rest
            (stage.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        case "USER":
            stage.user = int(rest)
        case "RUN":
            if stage.run(["/bin/sh", "-c", rest], {**network, **stage.args}) != 0:
                raise RuntimeError(f"RUN {rest}")
        case "COPY":
            copy(stage, rest.split(), built)
        case "HEALTHCHECK":
            stage.healthcheck = json.loads(rest.partition("CMD ")[2])
        case "ENTRYPOINT":
            stage.entrypoint, stage.command = json.loads(rest), []
        case "CMD":
            stage.command = json.loads(rest)
        case "EXPOSE" | "VOLUME" | "STOPSIGNAL":
            pass
        case _:
            raise RuntimeError(f"unknown instruction {name}")


def copy(stage: Stage, words: list[str], built: Mapping[str, Stage]) -> None:
    """COPY, from the repository or from another stage."""
    origin = CONTEXT
    if words[0].startswith("--from="):
        origin = built[words.pop(0).removeprefix("--from=")].root
    *sources, target = words
    for source in sources:
        path = origin / source.lstrip("/")
        place = stage.root / os.path.join(stage.folder, target).lstrip("/")
        if path.is_dir():
            shutil.copytree(
                path, place, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
            )
        else:
            shutil.copy(path, place)


def check_start(stage: Stage) -> None:
    """Starts the stage's command as its user, waits until it is healthy, and stops it.

    Raises:
        RuntimeError: it ended by itself, did not get healthy, or did not end well on SIGTERM.
    """
    network = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.lower().endswith("_proxy")}
    with mounted_proc(stage.root):
        started = time.monotonic()
        process = stage.start([*stage.entrypoint, *stage.command], network)
        while stage.run(stage.healthcheck, {}) != 0:
            if process.poll() is not None or time.monotonic() - started > START_SECONDS:
                process.kill()
                raise RuntimeError("it did not get healthy")
            time.sleep(5)
        print(f"ok  healthy as user {stage.user} after {time.monotonic() - started:.0f} s", flush=True)
        process.send_signal(signal.SIGTERM)
        if (status := process.wait(60)) != 0:
            raise RuntimeError(f"status {status} after SIGTERM")
        print("ok  ended with status 0 on SIGTERM", flush=True)


@contextlib.contextmanager
def mounted_proc(root: Path) -> Iterator[None]:
    """`/proc` inside the root, as every container has it."""
    subprocess.run(["mount", "-t", "proc", "proc", root / "proc"], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", root / "proc"], check=True)


if __name__ == "__main__":
    main()
