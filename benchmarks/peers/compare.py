"""curkv beside other servers for CPUs, in one run: a table, a plot, and the ratios to the best of the others.

    for peer in openvino llama vllm; do benchmarks/peers/$peer.sh install; done      # once
    python benchmarks/peers/compare.py results.jsonl --plot peers.png

Contenders take turns: each workload of each repeat starts a server of its own, so that no cache and no memory
is left of what came before. All serve the default model on all cores. OUTPUT gets a line per measurement; a
run that was stopped goes on, and what is there already is not measured again. The servers write to a log
beside it.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from curkv.bench import report
from curkv.bench.client import Served, measure, warm_up
from curkv.bench.measurement import Measurement, medians
from curkv.bench.process import curkv_serve, peak_bytes, running
from curkv.bench.script import script
from curkv.bench.workload import WORKLOADS, Workload
from curkv.models.loading import load_tokenizer, resolve_model

HERE = Path(__file__).parent
MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Contender:
    """A server and how it is asked.

    Attributes:
        command: starts it; `{port}` is its port.
        kv: eviction controls of every request.
        workloads: what it takes part in.
    """

    command: Sequence[str]
    kv: dict[str, str] = field(default_factory=dict)
    workloads: Sequence[str] = tuple(WORKLOADS)


def contenders(curkv_options: Sequence[str]) -> dict[str, Contender]:
    """All of them; the names of curkv's begin with it."""
    curkv = curkv_serve("--model", MODEL, *curkv_options)
    int8 = [*curkv, "--weights", "int8"]
    # Of the others only those for documents hold prefixes, too.
    alone = ["--prefix-cache-memory", "0"]
    openvino = [str(HERE / "openvino.sh"), "serve", "{port}"]
    llama = [str(HERE / "llama.sh"), "serve", "{port}"]
    loads = ("one-stream", "long", "longer")
    snapcur = {"policy": "snapcur", "budget": "25%"}
    compactor = {"policy": "compactor", "allocation": "adaptive", "budget": "25%"}
    steps = ["--max-batched-tokens", "1024"]
    return {
        "curkv int8, full cache": Contender([*int8, *alone], workloads=loads),
        "curkv int4, full cache": Contender([*curkv, "--weights", "int4", *alone], workloads=loads[:2]),
        "curkv int8, snapcur 25%": Contender([*int8, *alone], snapcur, loads[1:]),
        "curkv int8, int8 KV, snapcur 25%": Contender(
            [*int8, *alone, "--kv-dtype", "int8"], snapcur, loads[1:]
        ),
        "curkv int8, prefix cache": Contender(int8, workloads=("document",)),
        "curkv int8, compactor 25%": Contender(int8, compactor, ("document",)),
        "OpenVINO int8, u8 KV": Contender([*openvino, *steps], workloads=loads),
        "OpenVINO int8, u8 KV, steps of 256": Contender(openvino, workloads=("long",)),
        "OpenVINO int8, u8 KV, evicts to 512": Contender(
            [*openvino, *steps, "--evict-to", "512"], workloads=loads[1:]
        ),
        "OpenVINO int8, u8 KV, prefix cache": Contender(
            [*openvino, "--prefix-caching"], workloads=("document",)
        ),
        "llama.cpp Q4_1, f16 KV": Contender(llama),
        "llama.cpp Q4_1, q8 KV": Contender(
            [*llama, "--cache-type-k", "q8_0", "--cache-type-v", "q8_0", "--flash-attn", "on"]
        ),
        "vLLM bfloat16": Contender([str(HERE / "vllm.sh"), "serve", "{port}"]),
    }


def main(
    output: Annotated[Path, typer.Argument(help="JSON lines.")],
    contender: Annotated[
        list[str] | None, typer.Option(help="Only those with this in their name; repeatable.")
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(help=f"Only this one; repeatable. [{', '.join(WORKLOADS)}]"),
    ] = None,
    repeats: Annotated[int, typer.Option(help="The median is reported.")] = 3,
    curkv_options: Annotated[str, typer.Option(help="More of curkv serve.")] = "",
    plot: Annotated[Path | None, typer.Option(help="Image to draw the figures into.")] = None,
) -> None:
    """Measures what is missing, then prints the table."""
    if unknown := set(workload or ()) - set(WORKLOADS):
        raise typer.BadParameter(", ".join(unknown), param_hint="--workload")
    field = {
        name: found
        for name, found in contenders(shlex.split(curkv_options)).items()
        if not contender or any(part in name for part in contender)
    }
    done = report.read(output)
    turns = [
        (repeat, load, name)
        for repeat in range(repeats)
        for load in workload or WORKLOADS
        for name, found in field.items()
        if load in found.workloads and (repeat, WORKLOADS[load], name) not in done
    ]
    for repeat, load, name in (bar := tqdm(turns, unit="measurement")):
        bar.set_postfix_str(f"{name}, {load}")
        result = run(name, field[name], WORKLOADS[load], repeat, output.with_suffix(".log"))
        report.append(output, repeat, result)
    results = medians(list(report.read(output).values()))
    peers = {m.contender for m in results if not m.contender.startswith("curkv")}
    order = {load: i for i, load in enumerate(WORKLOADS.values())}
    results.sort(key=lambda m: (order[m.workload], list(contenders([])).index(m.contender)))
    print(report.table(results, sorted(peers)))
    for peer in sorted(HERE.glob("*.sh")):
        print(subprocess.run([peer, "version"], capture_output=True, text=True).stdout.strip())
    if plot:
        report.plot(results, plot)


def run(name: str, contender: Contender, workload: Workload, repeat: int, log: Path) -> Measurement:
    """Starts a server, measures it once and stops it."""
    tokenizer = load_tokenizer(resolve_model(MODEL))
    with log.open("w") as file, running(contender.command, file) as (url, process):
        served = Served.at(url)
        warm_up(served, tokenizer)
        result = measure(served, name, workload, tokenizer, repeat, contender.kv)
        return replace(result, peak_bytes=peak_bytes(process.pid))


app = script(__doc__, main)

if __name__ == "__main__":
    app()
