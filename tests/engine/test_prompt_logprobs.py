"""Log-probabilities of the prompt, and requests that generate nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from curkv.bench import baseline
from curkv.cache.parsing import parse_options
from curkv.engine.engine import Engine
from curkv.engine.scheduler import MAX_JUDGED_TOKENS
from curkv.engine.types import InvalidRequest, Output

from .conftest import Loaded, request, run, tokens

MakeEngine = Callable[..., Engine]
LENGTH = 40


@pytest.fixture(scope="module")
def expected(loaded: Loaded) -> torch.Tensor:
    """Log-probabilities of transformers, float32 [LENGTH, vocab]."""
    model = baseline.load(loaded.directory)
    with torch.inference_mode():
        return model(torch.tensor([loaded.prompt(LENGTH)])).logits[0].log_softmax(-1)


@pytest.mark.parametrize(("max_step_tokens", "max_tokens", "n"), [(16, 0, 1), (512, 1, 2), (512, 2, 1)])
def test_they_are_those_of_transformers_whatever_the_chunks(
    make_engine: MakeEngine,
    loaded: Loaded,
    expected: torch.Tensor,
    max_step_tokens: int,
    max_tokens: int,
    n: int,
) -> None:
    prompt = loaded.prompt(LENGTH)
    engine = make_engine(max_step_tokens=max_step_tokens)
    kv = parse_options({"policy": "curdkv", "budget": "50%"})
    outputs = run(engine, request(prompt, max_tokens, prompt_logprobs=2, n=n, kv=kv))
    assert len(outputs) == n
    for (_, _), [first, *others] in outputs.items():
        assert len(tokens([first, *others])) == max_tokens
        assert all(output.prompt_logprobs is None for output in others)
        assert [entry.token_id for entry in first.prompt_logprobs] == prompt[1:]
        for row, entry in zip(expected, first.prompt_logprobs, strict=False):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=2e-3)
            best = row.topk(2)
            assert [i for i, _ in entry.top] == best.indices.tolist()
            assert [p for _, p in entry.top] == pytest.approx(best.values.tolist(), abs=2e-3)


def test_a_preempted_prompt_is_judged_once(make_engine: MakeEngine, loaded: Loaded) -> None:
    pages = loaded.model.config.num_layers * loaded.model.config.num_kv_heads * 4
    engine = make_engine(num_pages=pages, max_step_tokens=64)
    items = [request(loaded.prompt(60, start=i), 30, id=str(i), prompt_logprobs=0) for i in range(2)]
    outputs = run(engine, *items)
    for item in items:
        judged = [output for output in outputs[item.id, 0] if output.prompt_logprobs is not None]
        assert [len(output.prompt_logprobs) for output in judged] == [59]


def test_whoever_decodes_waits_for_few_rows_of_logits(make_engine: MakeEngine, loaded: Loaded) -> None:
    judged = request(loaded.prompt(200), 0, id="judged", prompt_logprobs=1)
    alone = run(make_engine(), judged)["judged", 0][0].prompt_logprobs
    engine = make_engine()
    engine.add(engine.plan(request(loaded.prompt(16, start=300), 12, id="decoding")))
    engine.step()
    engine.add(engine.plan(judged))
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
        assert engine.last_stats.prompt_tokens <= MAX_JUDGED_TOKENS
    [last] = [output for output in outputs if output.request_id == "judged"]
    assert last.prompt_logprobs == alone


def test_no_tokens_end_after_the_prompt_and_a_full_context_has_no_room(
    make_engine: MakeEngine, loaded: Loaded
) -> None:
    engine = make_engine(max_model_len=32)
    [output] = run(engine, request(loaded.prompt(32), 0))["r", 0]
    assert (output.text, output.token_ids, output.finish_reason) == ("", [], "length")
    assert output.prompt_logprobs is None
    assert output.kv is not None and output.kv.kept_tokens == 32
    with pytest.raises(InvalidRequest):
        engine.plan(request(loaded.prompt(32), max_tokens=None))  # type: ignore[arg-type]
