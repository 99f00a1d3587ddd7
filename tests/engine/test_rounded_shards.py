"""Rounded weights in two processes, over gloo, of which a process can be one of a single group at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from curkv.engine.build import build_engine
from curkv.kernels.cpu.threads import THREADS
from tests.tensor_parallel import write_model

from .conftest import run
from .test_tensor_parallel import KEPT, asked, options, outcome


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_that_are_rounded_by_each_process_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    """Groups of int4 lie in one process; a row of int8 that two have columns of has a scale in each."""
    monkeypatch.setattr(THREADS, "set", lambda count: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = write_model(tmp_path / "model", intermediate_size=128)
    threads, found = torch.get_num_threads(), []
    for processes in (1, 2):
        engine = build_engine(options(made, processes, weights=weights, kv_dtype="float16"))
        outputs = run(engine, asked(KEPT, max_tokens=12, prompt_logprobs=0), asked({}, 2, max_tokens=12))
        judged = [entry.logprob for news in outputs["1", 0] for entry in news.prompt_logprobs or ()]
        found.append((outcome(outputs), torch.tensor(judged, dtype=torch.float64)))
        engine.close(1.0)
    torch.set_num_threads(threads)
    (expected, exact), (tokens_found, judged_found) = found
    if weights == "int4":
        assert tokens_found == expected
    torch.testing.assert_close(judged_found, exact, rtol=0, atol=0.1 if weights == "int4" else 0.5)
