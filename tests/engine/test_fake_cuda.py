"""The engine over fake CUDA tensors: no device or dtype is mixed up, the host waits where it is said to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from curkv.cache.attention import PagedAttention
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.page_manager import PageManager
from curkv.cache.parsing import parse_options
from curkv.cache.policies import policy_names
from curkv.engine.cuda_graphs import CudaGraphs
from curkv.engine.engine import Engine
from curkv.engine.replay import Replay
from curkv.engine.runner import Runner
from curkv.engine.types import Request, Structure
from curkv.kernels.dispatch import get_kernels
from curkv.kernels.formats import get_format
from curkv.kernels.linear.formats import BFLOAT16, FP8, GPU_INT8, WeightFormat
from curkv.models.decoder import Decoder
from curkv.models.info import ModelInfo
from curkv.models.rope import rope_tables

from .conftest import request
from .fake_cuda import DEVICE, FakeCuda, fake_cuda, load_guard
from .small_model import CONFIG, random_checkpoint

pytestmark = pytest.mark.triton

Waits = dict[str, int]

TOKEN = {"engine.sampling.sample": 1}
"""A step waits for its tokens, and for nothing else."""

EVICTION = {
    "cache.page_manager.wait": 1,  # so that the step is no part of the eviction's time
    "cache.eviction.evict": 1,  # how many each head keeps
}
"""Evictions wait twice, however many layers and sequences there are, and once more for some policies."""

SNAPCUR: Waits = {"cache.policies.snapcur._passages": 1}
MORE_OF_POLICY: dict[str, Waits] = {
    "auto": SNAPCUR,
    "snapcur": SNAPCUR,
    "defensivekv": {"cache.policies.defensivekv._shares": 1},
    "layer-defensivekv": {"cache.policies.defensivekv._shares": 1},
    "pyramidkv": {"cache.allocation.budgets": 1},
    "lava": {"cache.allocation._in_proportion": 1},
    "cake": {"cache.allocation._in_proportion": 1},
    "expected-attention": {"cache.policies.expected_attention.mean_rotations": 1},
    "capkv": {"cache.policies.expected_attention.mean_rotations": 1},
}
"""What policies wait for besides, in each of their evictions."""

HALF = {"policy": "snapkv", "budget": "50%"}


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    load_guard(tmp_path_factory.mktemp("guard"))


@pytest.fixture
def cuda(guard: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    with fake_cuda(monkeypatch) as fake:
        yield fake


def make_engine(
    cuda: FakeCuda,
    kv_dtype: str = "bfloat16",
    pages: int = 500,
    prefix_pages: int = 0,
    layers: int = 2,
    form: WeightFormat = BFLOAT16,
) -> Engine:
    """An engine as it is built for a GPU, but for the graphs, which are not captured."""
    config = replace(CONFIG, num_layers=layers)
    kernels = get_kernels("triton", DEVICE)
    model = Decoder(config, random_checkpoint(DEVICE, torch.bfloat16, layers), kernels, form)
    layout = CacheLayout(
        full_attention(layers, config.num_kv_heads), config.head_dim, 16, get_format(kv_dtype), 4, 256
    )
    kv = PageManager(layout, pages, kernels, DEVICE, prefix_pages)
    attention = PagedAttention(kv, rope_tables(config, 256), model.output_projection, dense_prompts=True)
    runner = Runner(model, attention, Replay(model, attention, CudaGraphs()))
    engine = Engine(runner, ModelInfo(letters()), 32, 256)
    cuda.waits.clear()
    return engine


def letters() -> Tokenizer:
    """Every letter is a token, "a" the first: what is sampled of data that is made up is all "a"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: (letter != "a", letter))
    words = {letter: index for index, letter in enumerate(alphabet[: CONFIG.vocab_size])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def ask(kv: dict[str, Any], tokens: int = 3, id: str = "r", length: int = 40, **sampling: Any) -> Request:
    return request([1] * length, tokens, id, parse_options(kv), **sampling)


def run(engine: Engine, *requests: Request) -> int:
    """Runs requests to their end; the number of evictions."""
    for item in requests:
        engine.add(engine.plan(item))
    evictions = 0
    while engine.has_work:
        for output in engine.step():
            assert output.finish_reason != "error"
        evictions += len(engine.last_stats.evictions)
    return evictions


def waits(*several: Waits) -> Counter[str]:
    return sum((Counter(some) for some in several), Counter())


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("policy", [name for name in policy_names() if name != "full"])
def test_a_policy_evicts_and_waits_three_times_at_most(cuda: FakeCuda, policy: str, layers: int) -> None:
    engine = make_engine(cuda, layers=layers)
    assert run(engine, ask({"policy": policy, "budget": "50%"})) == 1
    evicting = waits(EVICTION, MORE_OF_POLICY.get(policy, {}))
    assert cuda.waits == waits(evicting, *[TOKEN] * 3)
    assert evicting.total() <= 3
    assert cuda.launches


def test_the_whole_cache_waits_for_its_tokens_alone(cuda: FakeCuda) -> None:
    run(make_engine(cuda), ask({"policy": "full"}, 5), ask({"policy": "full"}, 5, "other", 70))
    assert set(cuda.waits) == set(TOKEN)


@pytest.mark.parametrize("leverage", ["sketch", "norm", "exact"])
@pytest.mark.parametrize("allocation", ["uniform", "adaptive", "pyramid"])
def test_leverage_and_allocations(cuda: FakeCuda, leverage: str, allocation: str) -> None:
    kv = {"policy": "curdkv", "budget": "50%", "leverage": leverage, "allocation": allocation}
    assert run(make_engine(cuda), ask(kv)) == 1


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_merging_waits_for_nothing(cuda: FakeCuda, kv_dtype: str) -> None:
    assert run(make_engine(cuda, kv_dtype), ask({**HALF, "merge": "nearest"})) == 1
    assert cuda.waits == waits(EVICTION, *[TOKEN] * 3)


@pytest.mark.parametrize("count", [1, 3])
def test_evictions_that_are_due_in_one_step_wait_together(cuda: FakeCuda, count: int) -> None:
    kv = {"policy": "tova", "budget": 10, "decode_budget": 10, "recent_tokens": 4}
    engine = make_engine(cuda)
    assert run(engine, *(ask(kv, 5, str(index), 10) for index in range(count))) == 4 * count
    assert cuda.waits == waits(*[EVICTION] * 4, *[TOKEN] * 5)


@pytest.mark.parametrize(
    "kv",
    [
        {"policy": "h2o", "budget": "50%", "decode_budget": 12, "decode_interval": 2, "recent_tokens": 4},
        {"policy": "snapkv", "budget": 10, "decode_budget": 10, "decode_interval": 2},
        {"policy": "curdkv", "budget": 10, "decode_budget": 10, "decode_interval": 2, "recent_tokens": 4},
    ],
    ids=lambda kv: kv["policy"],
)
def test_evictions_of_what_was_generated(cuda: FakeCuda, kv: dict[str, Any]) -> None:
    evictions = run(make_engine(cuda), ask(kv, 7), ask({"policy": "full"}, 7, "full"))
    assert evictions >= 2
    assert cuda.waits == waits(*[EVICTION] * evictions, {"engine.sampling.sample": 8})


def test_a_prompt_evicted_while_it_is_computed(cuda: FakeCuda) -> None:
    kv = {"policy": "snapkv", "budget": 20, "prefill": "streaming", "prefill_chunk": 16}
    evictions = run(make_engine(cuda), ask(kv, length=100))
    assert evictions > 2
    assert cuda.waits == waits(*[EVICTION] * evictions, *[TOKEN] * 3)


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
@pytest.mark.parametrize("policy", ["curdkv", "snapkv", "h2o", "compactor", "expected-attention"])
def test_rounded_cache(cuda: FakeCuda, policy: str, kv_dtype: str) -> None:
    assert run(make_engine(cuda, kv_dtype), ask({"policy": policy, "budget": "50%"})) == 1


def test_prompts_that_begin_attend_densely_and_wait_for_nothing(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curkv.cache.batch.LONG_CHUNK", 16)
    run(make_engine(cuda), ask({"policy": "full"}, 5, "a", 20), ask({"policy": "full"}, 5, "b", 70))
    assert set(cuda.waits) == set(TOKEN)
    assert run(make_engine(cuda), ask({"policy": "h2o", "budget": "50%"})) == 1


@pytest.mark.parametrize("form", [FP8, GPU_INT8], ids=lambda form: form.name)
def test_rounded_weights_wait_for_nothing(cuda: FakeCuda, form: WeightFormat) -> None:
    engine = make_engine(cuda, form=form)
    assert engine.runner.model.weights == form.name
    run(engine, ask({"policy": "full"}))
    assert cuda.waits == waits(*[TOKEN] * 3)
    assert run(engine, ask({"policy": "criticalkv", "budget": "50%"})) == 1  # which looks at W_o


@pytest.mark.parametrize("kv", [{"policy": "full"}, HALF], ids=str)
def test_prefixes_and_forks_wait_for_nothing(cuda: FakeCuda, kv: dict[str, Any]) -> None:
    engine = make_engine(cuda, prefix_pages=400)
    evictions = sum(run(engine, ask(kv, 1, str(i), n=2, temperature=1.0, seed=1)) for i in range(2))
    assert engine.kv.prefixes.held_pages
    assert cuda.waits == waits(*[EVICTION] * evictions, *[TOKEN] * 2)


def test_preempted_sequences_start_anew(cuda: FakeCuda) -> None:
    engine, preempted = make_engine(cuda, pages=20), 0
    for index in range(3):
        engine.add(engine.plan(ask({"policy": "full"}, 5, str(index), 15)))
    while engine.has_work:
        engine.step()
        preempted += engine.last_stats.preemptions
    assert preempted
    assert set(cuda.waits) == set(TOKEN)


def test_explanations(cuda: FakeCuda) -> None:
    asked = ({"policy": "curdkv", "budget": "50%"}, HALF, {"policy": "criticalkv", "budget": "50%"})
    item = replace(ask({"policy": "full"}, 0), explain=tuple(map(parse_options, asked)))
    run(make_engine(cuda), item)


@pytest.mark.parametrize(
    ("sampling", "more"),
    [
        ({"structure": Structure("regex", "a{9}", "p")}, 0),
        ({"structure": Structure("regex", "a{9}", "p"), "temperature": 1.0, "seed": 1, "n": 2}, 0),
        ({"repetition_penalty": 1.1, "presence_penalty": 0.5, "logit_bias": {3: 1.0}}, 0),
        ({"frequency_penalty": 0.5, "min_tokens": 2, "stop_token_ids": [5]}, 0),
        ({"temperature": 0.7, "seed": 1, "top_p": 0.9, "top_k": 20, "min_p": 0.01}, 0),
        ({"logprobs": 3}, 6),
        ({"prompt_logprobs": 3}, 4),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_sampling(cuda: FakeCuda, sampling: dict[str, Any], more: int) -> None:
    run(make_engine(cuda), ask({"policy": "full"}, **sampling))
    assert cuda.waits == waits(*[TOKEN] * 3, {"engine.sampling.token_logprobs": more})
