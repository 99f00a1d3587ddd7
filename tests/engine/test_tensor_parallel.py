"""A model in two processes, over gloo: what comes of it is what one process computes."""

from __future__ import annotations

import pickle
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from curkv.cache.parsing import parse_options
from curkv.cache.policies import policy_names
from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.engine.faults import EngineBroken
from curkv.engine.lockstep import Followers, Order, follow
from curkv.engine.types import Output, Request
from curkv.kernels.cpu.threads import THREADS
from curkv.models.errors import UnsupportedModel
from tests.tensor_parallel import prompt, write_model

from .conftest import request, run, tokens

KEPT = {"policy": "adasnapkv", "budget": "25%"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose biases are not 0."""
    made = write_model(tmp_path_factory.mktemp("model"))
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(made / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    return made


def options(directory: Path, processes: int, **more: Any) -> EngineOptions:
    """Room for about 480 tokens of a sequence that keeps all."""
    settings = {
        "weights": "float32",
        "kv_dtype": "float32",
        "device": "cpu",
        "page_size": 16,
        "kv_cache_memory": 1 << 20,
        "prefix_cache_memory": 1 << 19,
        "max_step_tokens": 64,
        "max_sequences": 8,
    }
    return EngineOptions(model=str(directory), tensor_parallel=processes, **settings | more)


@pytest.fixture(scope="module")
def engines(directory: Path) -> Iterator[tuple[Engine, Engine]]:
    """One process, and two; other tests have the threads that they had."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(THREADS, "set", lambda count: None)
        one, two = (build_engine(options(directory, processes)) for processes in (1, 2))
    yield one, two
    two.close(1.0)
    torch.set_num_threads(threads)


@pytest.fixture
def both(engines: tuple[Engine, Engine]) -> tuple[Engine, Engine]:
    """Both, with nothing cached."""
    for engine in engines:
        engine.drop_prefixes()
    return engines


def asked(kv: dict[str, Any], text: int = 1, length: int = 180, **more: Any) -> Request:
    return request(prompt(length, text), id=f"{text}", kv=parse_options(kv), **more)


def outcome(outputs: dict[tuple[str, int], list[Output]]) -> dict[Any, Any]:
    """Tokens, and what was kept, of each choice."""
    kept = {key: news[-1].kv for key, news in outputs.items()}
    counts = {k: (r.kept_tokens, r.evicted_tokens, r.decode_evictions) for k, r in kept.items() if r}
    return {key: (tokens(news), counts[key], news[0].cached_tokens) for key, news in outputs.items()}


def test_tokens_are_those_of_one_process(both: tuple[Engine, Engine]) -> None:
    requests = (
        asked({}, 1, max_tokens=12),
        asked({}, 2, 70, max_tokens=12, temperature=1.0, seed=5, n=2),
        asked(KEPT, 3, max_tokens=12, temperature=0.7, top_p=0.9, seed=6),
    )
    expected, found = (run(engine, *requests) for engine in both)
    assert outcome(found) == outcome(expected)
    assert both[1].kv.num_pages == both[0].kv.num_pages // 2


def test_what_policies_would_keep_is_what_they_keep_in_one_process(both: tuple[Engine, Engine]) -> None:
    names = [name for name in policy_names() if name not in ("full", "auto")]
    plans = tuple(parse_options({"policy": name, "budget": "25%"}) for name in names)
    asks = replace(asked({}, length=190, max_tokens=0), explain=plans)
    expected, found = (run(engine, asks)["1", 0][-1].explanations for engine in both)
    assert [explanation.policy for explanation in found] == names
    for mine, theirs in zip(found, expected, strict=True):
        assert np.array_equal(mine.kept, theirs.kept), mine.policy
        assert mine.bytes_kept >= theirs.bytes_kept  # heads of two processes share pages
        np.testing.assert_allclose(mine.errors, theirs.errors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kv",
    [
        KEPT,
        {"policy": "criticalkv", "budget": "25%", "allocation": "adaptive"},
        {"policy": "kvzip", "budget": "50%"},
        {"policy": "lava", "budget": "25%", "merge": "nearest"},
        {"policy": "adacurdkv", "budget": "25%", "prefill": "streaming", "prefill_chunk": 32},
        {
            "policy": "h2o",
            "allocation": "adaptive",
            "decode_budget": 32,
            "decode_interval": 4,
            "recent_tokens": 8,
        },
    ],
    ids=lambda kv: kv["policy"],
)
def test_what_is_generated_from_what_was_kept_is_the_same(
    both: tuple[Engine, Engine], kv: dict[str, Any]
) -> None:
    expected, found = (outcome(run(engine, asked(kv, max_tokens=20, n=2))) for engine in both)
    assert found == expected


def test_prompts_are_reused_alike(both: tuple[Engine, Engine]) -> None:
    context = {"policy": "adacurdkv", "budget": "25%", "context_tokens": 100}
    results = []
    for engine in both:
        alike = [asked({}, 4, length) for length in (120, 180)]
        alike += [replace(asked(context, 5, length)) for length in (140, 180)]
        results.append([outcome(run(engine, item)) for item in alike])
    assert results[1] == results[0]
    cached = [[found for _, _, found in result.values()] for result in results[1]]
    assert cached == [[0], [120], [0], [100]]


def test_a_conversation_goes_on_alike(both: tuple[Engine, Engine]) -> None:
    results = []
    for engine in both:
        turns, said = [], prompt(100, 7)
        for turn in range(3):
            item = replace(request(said, 8, id=f"turn {turn}", kv=parse_options(KEPT)), session="talk")
            [(_, outputs)] = run(engine, item).items()
            turns.append(outcome({("turn", turn): outputs}))
            said = [*said, *tokens(outputs), *prompt(30, turn)]
        assert len(engine.sessions("")) == 1
        engine.drop_session("", "talk")
        results.append(turns)
    assert results[1] == results[0]
    assert all(found for turn in results[1][1:] for _, _, found in turn.values())


def test_sequences_are_preempted_alike(both: tuple[Engine, Engine]) -> None:
    requests = [asked({}, seed, 110, max_tokens=40) for seed in range(4)]
    preempted, results = [], []
    for engine in both:
        for item in requests:
            engine.add(engine.plan(item))
        preempted.append(0)
        outputs: dict[tuple[str, int], list[Output]] = {}
        while engine.has_work:
            for output in engine.step():
                outputs.setdefault((output.request_id, output.index), []).append(output)
            preempted[-1] += engine.last_stats.preemptions
        results.append({key: tokens(news) for key, news in outputs.items()})
    assert results[1] == results[0]
    assert preempted[0] == preempted[1] > 0


def test_a_request_that_is_aborted_leaves_nothing_in_any_process(both: tuple[Engine, Engine]) -> None:
    _, two = both
    two.add(two.plan(asked(KEPT, 8, max_tokens=50, n=2)))
    for _ in range(5):
        two.step()
    assert two.kv.used_pages
    two.abort("8")
    assert two.kv.used_pages == 0
    expected, found = (outcome(run(engine, asked(KEPT, 9))) for engine in both)
    assert found == expected


def test_what_is_exchanged_is_counted(both: tuple[Engine, Engine]) -> None:
    one, two = both
    before = dict(two.last_stats.exchanged)
    run(two, asked({}, 10, 64, max_tokens=3))
    sums = two.last_stats.exchanged["sums"] - before["sums"]
    assert sums == (64 + 2) * 2 * 2 * 64 * 4  # tokens, layers, attention and MLP, channels, float32
    assert one.last_stats.exchanged == {}


@pytest.mark.parametrize(
    ("processes", "settings", "error", "said"),
    [
        (3, {}, UnsupportedModel, "--tensor-parallel 3 does not divide the model's 2 KV heads"),
        (2, {"prefix_store": "/nowhere"}, ValueError, "does without --prefix-store"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_starts(
    directory: Path, processes: int, settings: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        build_engine(options(directory, processes, **settings))


def test_a_process_that_ends_is_noticed_while_nothing_is_asked() -> None:
    process = subprocess.Popen(("sleep", "60"), stdin=subprocess.PIPE)
    lost: Future[EngineBroken] = Future()
    followers = Followers([process])
    followers.watch(lost.set_result)
    process.kill()
    assert "rank 1 has ended with status -9" in str(lost.result(10))
    followers.end()


def test_a_process_whose_books_differ_ends(engines: tuple[Engine, Engine]) -> None:
    one, _ = engines
    order = Order("step", (), 0.0, one.scheduler.pace, (1, 2, 3, 4))
    with pytest.raises(EngineBroken, match="books"):
        follow(one, BytesIO(pickle.dumps(order)))
