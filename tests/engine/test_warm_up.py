"""On a CPU nothing is compiled while requests run; tried in a process of its own, as kernels are shared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from curkv.bench.script import submit
from curkv.cache.parsing import parse_options
from curkv.cache.policies import policy_names
from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.types import SamplingParams
from curkv.kernels.cpu import workers

engine = build_engine(EngineOptions(model=sys.argv[1]))
for name in policy_names():
    options = {} if name == "full" else {"policy": name, "budget": "25%"}
    if name == "h2o":
        options |= {"decode_budget": 16, "decode_interval": 1, "recent_tokens": 4}
    known = set(workers._compiled)
    submit(engine, name, list(range(100, 160)), SamplingParams(max_tokens=3), parse_options(options))
    while engine.has_work:
        engine.step()
    for address in set(workers._compiled) - known:
        print(name, workers._compiled[address].__name__)
"""


def test_the_warm_up_leaves_nothing_to_be_compiled(default_model_dir: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(default_model_dir)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""
