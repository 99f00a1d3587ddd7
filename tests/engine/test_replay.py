"""Recorded decode steps give bit for bit what the kernels give one by one."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from curkv.cache.attention import PagedAttention
from curkv.cache.batch import Batch
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.page_manager import PageManager
from curkv.cache.parsing import parse_options
from curkv.engine.cuda_graphs import CudaGraphs
from curkv.engine.recorded_launches import RecordedLaunches
from curkv.engine.replay import MadeStep, Replay
from curkv.kernels.dispatch import get_kernels
from curkv.kernels.formats import get_format
from curkv.kernels.linear.formats import WEIGHT_FORMATS
from curkv.models.decoder import Decoder
from curkv.models.loading import load_config
from curkv.models.loading.checkpoint import Checkpoint
from curkv.models.rope import rope_tables

from .conftest import Loaded, request, run, tokens

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 52,
    "intermediate_size": 84,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 16,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, attention_bias=True),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": Qwen2MoeConfig(**SHAPE, **EXPERTS, shared_expert_intermediate_size=40),
    "qwen3-moe": Qwen3MoeConfig(**SHAPE, **EXPERTS, norm_topk_prob=True),
    "granite-moe": GraniteMoeConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "gpt-oss": GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=256),
}


@pytest.mark.parametrize("form", ["float32", "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_recorded(
    family: str, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    config, kernels = load_config(tmp_path), get_kernels("cpu")
    model = Decoder(config, Checkpoint(tmp_path, config), kernels, WEIGHT_FORMATS[form])
    layout = CacheLayout(
        full_attention(config.num_layers, config.num_kv_heads),
        config.head_dim,
        16,
        get_format("float16"),
        4,
        128,
    )
    caches = [PageManager(layout, 64, kernels) for _ in range(2)]
    rope = rope_tables(config, 128)
    attention, other = (PagedAttention(kv, rope, sinks=model.sinks) for kv in caches)
    slots = [[kv.add_sequence() for _ in range(3)] for kv in caches]
    decodes = Replay(model, attention, RecordedLaunches())
    for step in range(40):
        count = 3 if step % 4 else 2
        for kv, rows in zip(caches, slots, strict=True):
            kv.extend(rows[:count], [1] * count)
        ids = torch.randint(config.vocab_size, (count, 1)).tolist()
        batch = Batch.build(slots[0][:count], ids, [step] * count)
        expected = model.forward(Batch.build(slots[1][:count], ids, [step] * count), other)
        assert torch.equal(decodes.forward(batch), expected)
    assert not caplog.records


def test_an_engine_that_records_gives_the_same_tokens(loaded: Loaded) -> None:
    """Sequences of different lengths come and go, evict, and share steps with prompts."""
    choices = [
        {"policy": "full"},
        {"policy": "curdkv", "budget": "50%"},
        {"policy": "snapkv", "budget": 200, "decode_budget": 200, "decode_interval": 3},
    ]

    def produced(recorded: bool) -> dict[str, list[int]]:
        engine = loaded.engine(recorded=recorded)
        result: dict[str, list[int]] = {}
        waiting = [
            request(loaded.text_ids[100 * i :][: 90 + 211 * i], 6 + 5 * i, id=str(i), kv=parse_options(kv))
            for i, kv in enumerate(choices)
        ]
        while waiting or engine.has_work:
            if waiting:
                item = waiting.pop()
                engine.add(engine.plan(item))
            for output in engine.step():
                result.setdefault(output.request_id, []).extend(tokens([output]))
        return result

    assert produced(True) == produced(False)


@pytest.mark.parametrize("policy", ["full", "snapkv", "tova", "h2o"])
def test_observed_sequences_are_recorded_too(
    loaded: Loaded, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two sequences one may be observed: steps of each number are made once, whatever they generate."""
    engine, steps = loaded.engine(), [0]
    forward = engine.runner.model.forward

    def counting(batch: Batch, attention: PagedAttention) -> Tensor:
        steps[0] += batch.only_decodes
        return forward(batch, attention)

    monkeypatch.setattr(engine.runner.model, "forward", counting)
    observed = {"budget": 60, "decode_budget": 60, "decode_interval": 4, "recent_tokens": 32}
    kv = {"policy": policy, **({} if policy == "full" else observed)}
    text = loaded.text_ids[:80]
    run(engine, request(text, 20, id="observed", kv=parse_options(kv)), request(text, 20, id="beside"))
    assert steps[0] == 1


def test_what_cannot_be_recorded_is_run_kernel_by_kernel(caplog: pytest.LogCaptureFixture) -> None:
    layout = CacheLayout(full_attention(1, 1), 8, 16, get_format("float32"), 4, 64)
    kv = PageManager(layout, 8, get_kernels("cpu"))
    attention = PagedAttention(kv, [(torch.ones(64, 4), torch.zeros(64, 4))] * len(kv.layout.layers))
    computed = SimpleNamespace(forward=lambda batch, _: batch.token_ids[:, None].float() + 1)
    decodes = Replay(computed, attention, RecordedLaunches())  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        for token in (5, 7):
            batch = Batch.build([0], [[token]], [0])
            assert decodes.forward(batch).tolist() == [[token + 1]]
    assert len(caplog.records) == 1


class Counting:
    """A maker that notes what it makes and runs, for steps of 1, 2 or 4 sequences."""

    name = "notes"

    def __init__(self, ahead: bool, fails: bool = False) -> None:
        self.ahead, self.fails, self.runs = ahead, fails, 0
        self.made: list[int] = []

    def size(self, count: int, most: int) -> int:
        return min(4 if count > 2 else count, most)

    def make(self, step: Callable[[], Tensor]) -> MadeStep:
        if self.fails:
            raise RuntimeError("no memory")
        logits = step()
        self.made.append(len(logits))

        def run() -> None:
            self.runs += 1
            logits.copy_(step())

        return MadeStep(run, logits)


def replay_over(maker: Counting) -> Replay:
    """Of a model whose logits are token, position and slot."""
    layout = CacheLayout(full_attention(1, 1), 8, 16, get_format("float32"), 4, 64)
    kv = PageManager(layout, 8, get_kernels("cpu"))

    def forward(batch: Batch, _: PagedAttention) -> Tensor:
        return torch.stack([batch.token_ids, batch.positions, batch.slots], 1).float()[batch.logit_rows]

    attention = PagedAttention(kv, [(torch.ones(64, 4), torch.zeros(64, 4))] * len(kv.layout.layers))
    return Replay(SimpleNamespace(forward=forward), attention, maker)  # type: ignore[arg-type]


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_steps_are_made_once_for_each_size_and_filled_up_with_rows_of_no_sequence(
    ahead: bool, fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    maker = Counting(ahead, fails)
    replay = replay_over(maker)
    replay.prepare()
    assert maker.made == ([4, 4, 2, 2, 1, 1] if ahead and not fails else [])
    for step in range(3):
        for count in (3, 1, 2, 4):
            slots, tokens = [3, 0, 2, 1][:count], [10 * step + i for i in range(count)]
            batch = Batch.build(slots, [[token] for token in tokens], [step] * count)
            expected = [[token, step, slot] for token, slot in zip(tokens, slots, strict=True)]
            assert replay.forward(batch).tolist() == expected
    assert len(maker.made) == (0 if fails else 6 if ahead else 3)
    assert maker.runs == (0 if fails else 12 if ahead else 9)
    assert len(caplog.records) == fails


def test_only_the_wanted_rows_are_given() -> None:
    replay = replay_over(Counting(ahead=False))
    for _ in range(2):
        batch = Batch.build([0, 1, 2], [[5], [6], [7]], [0, 0, 0], wanted=[1, 0, 1])
        assert replay.forward(batch)[:, 0].tolist() == [5, 7]


@pytest.mark.parametrize(("count", "most", "size"), [(1, 6, 1), (3, 6, 4), (5, 6, 6), (6, 6, 6), (2, 64, 2)])
def test_graphs_have_sizes_of_powers_of_two_up_to_the_most(count: int, most: int, size: int) -> None:
    assert CudaGraphs().size(count, most) == size


def test_recording_does_not_import_the_compiler_of_torch() -> None:
    """It would take 100 MB, as much as the model."""
    script = (
        "import sys, torch, curkv.engine.build\n"
        "from curkv.engine.recorded_launches import _LaunchesOnly\n"
        "with _LaunchesOnly(): torch.empty(1)\n"
        "assert not {'torch._dynamo', 'triton', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
