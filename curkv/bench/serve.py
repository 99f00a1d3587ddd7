"""Speed of a server under load: TTFT, inter-token latency, throughput; transformers in the same run.

Every figure of a workload is taken in one run and in turn, so that ratios hold on a noisy machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from tqdm import tqdm

from curkv.bench import baseline
from curkv.bench.client import Served, measure, warm_up
from curkv.bench.measurement import Measurement, medians
from curkv.bench.process import curkv_serve, running
from curkv.bench.workload import Workload


def run(
    model: str,
    url: str | None,
    workloads: Sequence[Workload],
    policy: str = "curdkv",
    budget: str = "25%",
    repeats: int = 3,
    transformers: bool = True,
) -> list[Measurement]:
    """Measures the full cache, a policy at a budget, and transformers, in turn.

    A server that is not curkv is measured as it is, without eviction controls.

    Args:
        model: what the server serves; its tokenizer cuts the prompts.
        url: base URL of a running OpenAI-compatible server; None starts `curkv serve` for the run.
        workloads: what to send.
        policy: eviction policy beside `full`.
        budget: its budget.
        repeats: runs of each; the median by decode rate is reported.
        transformers: whether to run its `generate` too, where there is no document.

    Returns:
        One measurement per workload and contender.
    """
    from curkv.models.loading import load_tokenizer, resolve_model

    directory = resolve_model(model)
    tokenizer = load_tokenizer(directory)
    reference = baseline.load(directory) if transformers else None
    samples = []
    with running(curkv_serve("--model", model)) if url is None else nullcontext((url, None)) as (base_url, _):
        served = Served.at(base_url)
        contenders: dict[str, dict[str, str]] = {"server": {}}
        if served.evicts:
            contenders = {
                "full": {"policy": "full"},
                f"{policy} {budget}": {"policy": policy, "budget": budget},
            }
        warm_up(served, tokenizer)
        for workload in tqdm(workloads, desc="workloads", unit="workload"):
            for repeat in range(repeats):
                for name, kv in contenders.items():
                    samples.append(measure(served, name, workload, tokenizer, repeat, kv))
                if reference is not None and not workload.document_tokens:
                    samples.append(baseline.measure(reference, workload, tokenizer, repeat))
    return medians(samples)
