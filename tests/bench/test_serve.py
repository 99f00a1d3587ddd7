"""Workloads are sent as they say, and what the client saw is reduced to figures that can be compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from curkv.bench.client import Served, measure
from curkv.bench.measurement import Measurement, Stream, medians, summary
from curkv.bench.report import append, plot, read, table
from curkv.bench.workload import WORKLOADS, Workload, parse_workload
from curkv.config import Settings
from tests.server.scripted import ScriptedClient, running

LOAD = Workload(2, 20, 4)
DOCUMENT = Workload(3, 5, 4, document_tokens=40)
RESULT = Measurement("full", LOAD, 1.0, 0.01, 0.02, 500.0, 100.0)


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Every word is the same token, and one that the scripted engine knows."""
    tokenizer = Tokenizer(models.WordLevel({"w0": 0}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def measured(
    kv: dict[str, str], workload: Workload, tokenizer: Tokenizer
) -> tuple[Measurement, ScriptedClient]:
    engine = ScriptedClient()
    with running(engine, Settings(served_model_name="words")) as url:
        return measure(Served.at(url), "server", workload, tokenizer, seed=0, kv=kv), engine


def test_a_workload_is_named_or_written_out() -> None:
    assert parse_workload("long") == parse_workload("8x2000+64") == WORKLOADS["long"]
    for wrong in ("longest", "8x2000", "0x2000+64", "8x2000+64 "):
        with pytest.raises(ValueError, match="no workload"):
            parse_workload(wrong)


def test_requests_are_sent_with_their_controls(tokenizer: Tokenizer) -> None:
    result, engine = measured({"policy": "curdkv", "budget": "50%"}, LOAD, tokenizer)
    assert [len(request.prompt_token_ids) for request in engine.taken] == [20, 20]
    assert {request.sampling.max_tokens for request in engine.taken} == {4}
    assert all(request.sampling.ignore_eos for request in engine.taken)
    assert result.kept_ratio == 0.5
    assert result.later_ttft is None


def test_questions_share_a_document_that_is_compressed_once(tokenizer: Tokenizer) -> None:
    result, engine = measured({"policy": "curdkv", "budget": "50%"}, DOCUMENT, tokenizer)
    assert [len(request.prompt_token_ids) for request in engine.taken] == [45, 45, 45]
    assert [request.eviction.context_tokens for request in engine.taken] == [40, 40, 40]
    assert len({request.cache_salt for request in engine.taken}) == 1
    assert engine.closed == [request.id for request in engine.taken]
    assert result.later_ttft is not None


def test_measurements_reuse_nothing_of_each_other(tokenizer: Tokenizer) -> None:
    _, first = measured({}, LOAD, tokenizer)
    _, second = measured({}, LOAD, tokenizer)
    assert first.taken[0].cache_salt != second.taken[0].cache_salt


def test_decoding_counts_while_all_requests_decode() -> None:
    streams = [Stream(10.0, [11.0, 12.0, 13.0, 14.0]), Stream(10.0, [12.0, 12.5, 13.0, 13.5])]
    result = summary("server", LOAD, streams)
    assert result.ttft == 1.5
    assert result.prefill_rate == 40 / 2.0
    assert result.decode_rate == 4 / 1.5  # 12.5, 13.0, 13.0 and 13.5
    assert (result.itl_p50, result.itl_p99) == (1.0, 1.0)


def test_requests_that_never_decode_together_have_no_decode_rate() -> None:
    streams = [Stream(0.0, [1.0, 2.0]), Stream(0.0, [3.0, 4.0])]
    result = summary("server", LOAD, streams)
    assert result.decode_rate is None
    assert table([RESULT, result], []).endswith("| - |")


def test_later_questions_are_reported_apart_from_the_first() -> None:
    streams = [Stream(0.0, [9.0, 9.5]), Stream(10.0, [10.2, 10.7]), Stream(11.0, [11.4, 11.9])]
    result = summary("server", Workload(3, 5, 2, document_tokens=40), streams)
    assert result.ttft == 9.0
    assert result.prefill_rate == 45 / 9.0
    assert result.later_ttft == pytest.approx(0.3)


def test_every_figure_is_its_own_median() -> None:
    fast = replace(RESULT, ttft=3.0, decode_rate=120.0)
    slow = replace(RESULT, ttft=2.0, decode_rate=None)
    assert medians([RESULT, fast, slow]) == [replace(RESULT, ttft=2.0)]


def test_ratios_are_to_the_best_of_the_references() -> None:
    a = replace(RESULT, contender="a", decode_rate=50.0, peak_bytes=2 << 20)
    b = replace(RESULT, contender="b", decode_rate=80.0, peak_bytes=4 << 20)
    _, _, ours, *_ = table([replace(RESULT, peak_bytes=1 << 20), a, b], ["a", "b"]).splitlines()
    assert "| 100.0 (1.25x) |" in ours
    assert "| 1 (2.00x) |" in ours
    assert "later TTFT" not in table([RESULT], [])


def test_figures_are_drawn(tmp_path: Path) -> None:
    document = replace(RESULT, workload=DOCUMENT, later_ttft=0.1)
    plot([RESULT, replace(RESULT, contender="other", decode_rate=None), document], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_measurements_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert read(path) == {}
    document = replace(RESULT, workload=DOCUMENT, later_ttft=0.1)
    for repeat, result in ((0, RESULT), (1, RESULT), (0, document)):
        append(path, repeat, result)
    assert read(path) == {
        (0, LOAD, "full"): RESULT,
        (1, LOAD, "full"): RESULT,
        (0, DOCUMENT, "full"): document,
    }
