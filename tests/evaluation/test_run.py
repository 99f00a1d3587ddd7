"""Runs are resumed, servers are asked as they should be, reports say what counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

from curkv.cli.eval import app
from curkv.evaluation.evaluator import Evaluator
from curkv.evaluation.measures import SERIES
from curkv.evaluation.records import Journal, Record, read_records
from curkv.evaluation.remote import RemoteEvaluator, ServerError
from curkv.evaluation.report import markdown
from curkv.evaluation.run import Plan, run_remote
from curkv.evaluation.statistics import mcnemar, mean, paired_difference, proportion
from curkv.evaluation.variants import FULL, cross, parse_variant

from .conftest import MakeEngine

RECORD = Record(
    "m", "needle", "documentation", 600, 0, "visible", "full", "", 600, 1.0, 0.1, 1.0, "7", depth=0.05
)
PLAN = Plan(["needle"], [900], range(2), ["documentation"], ["visible"], cross(["curdkv"], ["50%"]))


def test_results_survive_a_killed_run(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with Journal.open(path) as journal:
        journal.append([RECORD])
    with path.open("a") as file:
        file.write('{"source": "m", "ta')
    other = replace(RECORD, seed=1)
    with Journal.open(path) as journal:
        journal.append([other, replace(other, score=0.0)])
    assert read_records(path) == [RECORD, replace(other, score=0.0)]


def test_only_what_is_missing_is_measured() -> None:
    done = replace(RECORD, length=900)
    jobs = PLAN.jobs("m", [done])
    assert [(job.recipe.seed, job.size) for job in jobs] == [(0, 1), (1, 2)]
    assert [variant.policy for variant in jobs[0].wanted["visible"]] == ["curdkv"]
    everything = [
        replace(done, seed=seed, policy=variant.policy, budget=variant.budget)
        for seed in PLAN.seeds
        for variant in PLAN.variants
    ]
    assert not PLAN.jobs("m", everything)
    assert len(PLAN.jobs("another model", everything)) == 2


def test_variants_are_read_like_a_request() -> None:
    variant = parse_variant("curdkv preset=paper recent_tokens=8", "25%")
    assert variant.options.preset == "paper" and variant.options.recent_tokens == 8
    assert cross(["full", "knorm"], ["0.5"]) == [FULL, parse_variant("knorm", "0.5")]
    with pytest.raises(ValueError, match="key=value"):
        parse_variant("curdkv paper", "25%")
    with pytest.raises(ValueError, match="preset"):
        parse_variant("curdkv preset=nope", "25%")


def test_questions_that_the_full_cache_fails_are_not_asked_again_of_others() -> None:
    variants = cross(["curdkv"], ["50%"])
    plan = Plan(["questions"], [900], range(1), ["log"], ["visible"], variants)
    full = replace(RECORD, task="questions", corpus="log", length=900, question="job")
    failed = replace(full, question="day", score=0.0, nll=None)
    [job] = plan.jobs("m", [full, failed])
    assert [variant.policy for variant in job.wanted["visible"]] == ["curdkv"]
    assert not plan.jobs("m", [full, failed, replace(full, policy="curdkv", budget="50%")])
    assert not plan.jobs("m", [failed])


def test_a_text_that_a_task_does_not_know_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="no text 'log' for needle"):
        replace(PLAN, corpora=["log"])


class Server(HTTPServer):
    """Answers every completion with 42; says what it kept if it is a curkv server."""

    curkv = True
    bodies: list[dict[str, Any]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        usage: dict[str, Any] = {"prompt_tokens": 5}
        if self.server.curkv:
            usage["kv"] = {"kept_ratio": 0.5}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"text": " 42"}], "usage": usage}).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.bodies = []
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_server_is_asked_for_each_variant(server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    evaluator = RemoteEvaluator(f"http://127.0.0.1:{server.server_port}", "m", tokenizer)
    run_remote(PLAN, evaluator, tmp_path / "out.jsonl", workers=2)
    records = read_records(tmp_path / "out.jsonl")
    assert [record.kept_ratio for record in records if record.policy == "curdkv"] == [0.5, 0.5]
    asked = [body.get("kv") for body in server.bodies]
    assert asked.count(None) == 2 and asked.count({"policy": "curdkv", "budget": "50%"}) == 2
    run_remote(PLAN, evaluator, tmp_path / "out.jsonl", workers=2)
    assert len(server.bodies) == 4


def test_what_no_server_can_be_asked_is_named(server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    evaluator = RemoteEvaluator(f"http://127.0.0.1:{server.server_port}", "m", tokenizer)
    with pytest.raises(ValueError, match="task copy cannot be measured with --url"):
        run_remote(replace(PLAN, tasks=["copy"]), evaluator, tmp_path / "out.jsonl", workers=1)


def test_a_server_that_evicts_nothing_is_not_measured_as_if_it_did(
    server: Server, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    server.curkv = False
    evaluator = RemoteEvaluator(f"http://127.0.0.1:{server.server_port}", "m", tokenizer)
    with pytest.raises(ServerError, match="did not apply policy 'curdkv'"):
        run_remote(PLAN, evaluator, tmp_path / "out.jsonl", workers=1)


def test_tasks_that_the_full_cache_fails_do_not_count() -> None:
    good = [replace(RECORD, seed=seed) for seed in range(4)]
    bad = [replace(record, task="qa_list", score=0.0) for record in good]
    text = markdown([*good, *bad])
    assert "| `needle` | 600 | visible | 100% [51%, 100%] | 0.100 [0.100, 0.100] | 4 | yes |" in text
    assert "the model cannot do it" in text
    assert "| `full` | 4 |" in text and "| `full` | 8 |" not in text


def test_questions_are_reported_of_what_the_full_cache_answers() -> None:
    full = replace(RECORD, task="questions", corpus="log", protocol="hidden")
    records = []
    for seed in range(4):
        for question in ("job", "day", "town"):
            own = replace(full, seed=seed, question=question)
            if question == "town":
                records += [replace(own, score=0.0, nll=None), replace(own, policy="knorm", budget="9%")]
                continue
            records += [own, replace(own, policy="knorm", budget="9%", score=float(question == "job"))]
            records.append(
                replace(own, policy="h2o", budget="9%", score=float(seed > 0), nll=0.1 + 0.1 * seed)
            )
    report = markdown(records)
    assert "| `log` | 600 | 67% [39%, 86%] | 12 |" in report
    assert "| `knorm` | 50% [22%, 78%] | 8 |" in report
    assert "| `h2o` | 75% [41%, 93%]; +25 (-25/+50), p 0.62 | 8 |" in report
    assert "| `knorm` | 4 of 8, 4 as likely |" in report and "| `h2o` | 2 of 8, 2 as likely |" in report
    whole = report[report.index("Contexts of which") :]
    assert "| `knorm` | 0% [0%, 49%] | 4 |" in whole and "| `h2o` | 75% [30%, 95%] | 4 |" in whole


def test_long_answers_are_reported_by_task_and_decode_budget() -> None:
    full = replace(RECORD, task="copy", corpus="", protocol="decoding", score=0.5)
    other = replace(full, policy="tova", budget="96", score=0.25)
    counted = [replace(full, task="counting", score=1.0), replace(other, task="counting", score=0.75)]
    report = markdown([full, other, *counted])
    assert "| policy | `copy`, 96 held | `counting`, 96 held | n |" in report
    assert "| `full` | 50% | 100% | 1 |" in report and "| `tova` | 25% | 75% | 1 |" in report
    assert "exact match" not in report and "Questions about texts" not in report


def test_report_of_a_real_run(make_engine: MakeEngine, tmp_path: Path) -> None:
    evaluator = Evaluator(make_engine(), "tiny")
    plan = replace(PLAN, tasks=["needle", "continuation"], seeds=range(1), protocols=["visible", "hidden"])
    with Journal.open(tmp_path / "r.jsonl") as journal:
        for job in plan.jobs("tiny", []):
            journal.append(
                replace(r, score=r.score and 1) for r in evaluator.evaluate(job.recipe, job.wanted)
            )
        journal.append(
            [replace(RECORD, source="tiny"), replace(RECORD, source="tiny", policy="knorm", budget="9%")]
        )
    result = CliRunner().invoke(app, ["report", str(tmp_path / "r.jsonl"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    report = (tmp_path / "out/report.md").read_text()
    assert "KL(full || policy)" in report
    images = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert images == {"quality-visible.png", "needle-visible.png", "quality-continuation.png"}
    assert all(f"({name})" in report for name in images)


def test_sources_are_compared_over_the_samples_they_share() -> None:
    records = [replace(RECORD, source=source, nll=nll) for source, nll in (("float", 0.1), ("int8", 0.2))]
    only_one_has_it = replace(RECORD, source="float", seed=1, nll=0.7)
    report = markdown([*records, only_one_has_it])
    assert "| policy | kept | float | int8 | n |" in report
    assert "| `full` | 100% | 0.100 | 0.200 | 1 |" in report
    assert "beside each other" not in markdown(records[:1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "nope"], "unknown task nope"),
        (["--policy", "nope"], "policy"),
        (["--policy", "curdkv", "--budget", "101%"], "budget"),
        (["--protocol", "nope"], "visible or hidden"),
        (["--weights", "nope"], "auto, float32, bfloat16, fp8, int8"),
        (["--kv-dtype", "nope"], "auto, float32"),
        (["--url", "http://x", "--protocol", "hidden"], "--url"),
    ],
)
def test_bad_input_is_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(tmp_path / "out.jsonl"), *arguments])
    assert result.exit_code == 1 and message in result.output


def test_paired_statistics() -> None:
    assert mcnemar(0, 0) == 1 and mcnemar(1, 9) == pytest.approx(22 / 1024)
    found = paired_difference([[1.0, 0.0], [0.0], [1.0, 1.0, 0.0]] * 5)
    assert found.mean == pytest.approx(0.5) and 0 < found.low < 0.5 < found.high < 1
    assert paired_difference([[0.0]] * 3).low == 0


def test_intervals() -> None:
    found = proportion([1.0] * 8 + [0.0] * 2)
    assert (found.mean, found.low, found.high) == pytest.approx((0.8, 0.490, 0.943), abs=1e-3)
    assert proportion([0.0]).low == 0
    found = mean([1.0, 2.0, 3.0, 4.0])
    assert (found.mean, found.high - found.mean) == pytest.approx((2.5, 3.182 * 1.29099 / 2), rel=0.01)


def test_no_interval_tells_what_cannot_be() -> None:
    assert mean([0.0, 0.0, 0.3]).low == 0 == mean([0.3]).low
    for shares in ([1.0, 1.0, 0.4], [0.0, 0.0, 0.6], [1.0] * 6):
        found = SERIES.estimate(shares)
        assert 0 <= found.low < found.high <= 1
