"""The engine over interpreted Triton kernels against the same over the CPU kernels; a small random Llama."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from curkv.cache.attention import PagedAttention
from curkv.cache.batch import Batch
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.page_manager import PageManager
from curkv.cache.parsing import parse_options
from curkv.engine.cuda_graphs import CudaGraphs
from curkv.engine.engine import Engine
from curkv.engine.replay import Replay
from curkv.engine.runner import Runner
from curkv.kernels.dispatch import get_kernels
from curkv.kernels.formats import get_format
from curkv.kernels.linear.formats import BFLOAT16, FLOAT32, FP8, GPU_INT8, WeightFormat
from curkv.models.decoder import Decoder
from curkv.models.info import ModelInfo
from curkv.models.rope import rope_tables
from tests.device import TEST_DEVICE

from .conftest import request, tokens
from .small_model import CONFIG, random_checkpoint

pytestmark = pytest.mark.triton


@dataclass
class Trace:
    """All that a run shows: tokens by request, pages in use and what each head kept after every step."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    used_pages: list[int] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    evictions: list[tuple[str, int, list[int]]] = field(default_factory=list)
    preemptions: int = 0


def engine_over(
    kernels_name: str,
    num_pages: int,
    graphs: bool = False,
    apart: bool = False,
    kv_dtype: str = "float32",
    form: WeightFormat = FLOAT32,
) -> Engine:
    device = TEST_DEVICE if kernels_name == "triton" else "cpu"
    kernels = get_kernels(kernels_name, device)
    model = Decoder(CONFIG, random_checkpoint(device, form.dtype), kernels, form)
    layout = CacheLayout(
        full_attention(CONFIG.num_layers, CONFIG.num_kv_heads),
        CONFIG.head_dim,
        16,
        get_format(kv_dtype),
        4,
        256,
    )
    kv = PageManager(layout, num_pages, kernels, device)
    attention = PagedAttention(kv, rope_tables(CONFIG, 256))
    if apart:
        kv.page_table, kv.lengths = kv.page_table.clone(), kv.lengths.clone()
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(CONFIG.vocab_size)}, unk_token="0"))
    runner = Runner(model, attention, Replay(model, attention, CudaGraphs()) if graphs else None)
    return Engine(runner, ModelInfo(tokenizer), 32, 256)


def trace(engine: Engine) -> Trace:
    """Run three requests that prefill in chunks, decode, and evict in both phases."""
    generator = torch.Generator().manual_seed(2)
    result = Trace()
    curdkv = {"policy": "curdkv", "budget": 14, "decode_budget": 16, "decode_interval": 3, "recent_tokens": 4}
    wanted = [(40, curdkv), (26, {"policy": "adacurdkv", "budget": "50%"}), (15, {"policy": "full"})]
    for i, (length, options) in enumerate(wanted):
        prompt = torch.randint(CONFIG.vocab_size, (length,), generator=generator).tolist()
        item = request(prompt, 9, id=str(i), kv=parse_options(options))
        engine.add(engine.plan(item))
    while engine.has_work:
        for output in engine.step():
            result.tokens.setdefault(output.request_id, []).extend(tokens([output]))
        stats = engine.last_stats
        result.used_pages.append(stats.used_pages)
        result.preemptions += stats.preemptions
        result.evictions += [
            (e.phase, e.pages_freed, e.head_budgets.flatten().tolist()) for e in stats.evictions
        ]
        result.kept += list(kept_positions(engine))
        engine.check_integrity()
    return result


def kept_positions(engine: Engine) -> Iterator[Tensor]:
    """Positions [L, H, n] that each sequence's heads hold."""
    for slot in engine.kv.active_slots:
        view = engine.runner.attention.view(slot)
        yield view.gather(view.pages.position, -1).cpu()


@pytest.fixture(scope="module", params=[100, 15], ids=["room for all", "preempting"])
def expected(request: pytest.FixtureRequest) -> tuple[int, Trace]:
    return request.param, trace(engine_over("cpu", request.param))


def assert_same(actual: Trace, wanted: Trace) -> None:
    assert actual.tokens == wanted.tokens
    assert actual.used_pages == wanted.used_pages
    assert actual.evictions == wanted.evictions
    assert actual.preemptions == wanted.preemptions
    assert len(actual.kept) == len(wanted.kept)
    assert all(torch.equal(a, b) for a, b in zip(actual.kept, wanted.kept, strict=True))


def test_triton_and_cpu_kernels_give_the_same_tokens_kept_sets_and_pages(expected: tuple[int, Trace]) -> None:
    num_pages, wanted = expected
    assert {phase for phase, *_ in wanted.evictions} == {"prefill", "decode"}
    assert (wanted.preemptions > 0) == (num_pages < 100)
    assert_same(trace(engine_over("triton", num_pages)), wanted)


def test_a_cache_of_8_bit_floats_keeps_and_answers_what_it_does_over_the_reference_kernels() -> None:
    found = []
    for name in ("triton", "reference"):
        engine = engine_over(name, 40, kv_dtype="fp8")
        options = parse_options({"policy": "snapkv", "budget": 12, "merge": "nearest"})
        engine.add(engine.plan(request(list(range(17)), 2, kv=options, n=2)))
        answers: dict[int, list[int]] = {}
        kept: list[Tensor] = []
        while engine.has_work:
            for output in engine.step():
                answers.setdefault(output.index, []).extend(tokens([output]))
            kept += kept_positions(engine)
            engine.check_integrity()
        found.append((answers, kept))
    (ours, kept), (wanted, expected) = found
    assert ours == wanted and len(wanted[1]) == 2
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))


def test_products_of_8_bits_give_the_logits_of_those_of_16_but_for_rounding() -> None:
    logits = {}
    for form in (BFLOAT16, FP8, GPU_INT8):
        runner = engine_over("triton", 4, kv_dtype="bfloat16", form=form).runner
        logits[form.name] = runner.run([runner.kv.add_sequence()], [[5, 6, 7]], [0], [3])
    exact = logits["bfloat16"]
    for name, most in (("fp8", 0.1), ("int8", 0.05)):
        assert logits[name].dtype == torch.float32
        assert 0 < (logits[name] - exact).norm() < most * exact.norm()


def test_padded_decode_steps_over_a_table_of_their_own_give_the_same() -> None:
    wanted = trace(engine_over("cpu", 15))
    assert_same(trace(engine_over("triton", 15, graphs=True, apart=True)), wanted)


@pytest.mark.skipif(TEST_DEVICE != "cpu", reason="launches are caught in Triton's interpreter")
def test_the_host_waits_for_nothing_within_a_decode_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors have no data: whatever reads one on the host, or mixes devices, raises."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: None)
    monkeypatch.setattr("curkv.kernels.paged_decode_attention.triton.num_processors", lambda _: 132)
    kernels = get_kernels("triton")
    model = Decoder(CONFIG, random_checkpoint("meta"), kernels)
    layout = CacheLayout(
        full_attention(CONFIG.num_layers, CONFIG.num_kv_heads),
        CONFIG.head_dim,
        16,
        get_format("float32"),
        4,
        256,
    )
    kv = PageManager(layout, 100, kernels, "meta")
    graphs = Replay(model, PagedAttention(kv, rope_tables(CONFIG, 256)), CudaGraphs())
    slots = [kv.add_sequence() for _ in range(3)]
    for position in range(18):
        kv.extend(slots, [1, 1, 1])
        batch = Batch.build(slots, [[5]] * 3, [position] * 3, device="meta")
        assert graphs.forward(batch).shape == (3, CONFIG.vocab_size)


def test_decoding_goes_on_without_graphs_where_none_can_be_captured(caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_over("triton", 100, graphs=True)
    engine.runner.replay.prepare()
    assert "decode runs without CUDA graphs" in caplog.text
    item = request([5, 6, 7], 3)
    engine.add(engine.plan(item))
    produced = []
    while engine.has_work:
        produced += tokens(engine.step())
    assert len(produced) == 3
