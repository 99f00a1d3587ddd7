"""Several keys: who they are, and that none sees what is another's."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from curkv.config import Settings
from curkv.engine.stats import SequenceStats, StepStats
from curkv.server.keys import Keys, KeysError
from tests.server.scripted import ScriptedClient, running

BODY = {"prompt": "w1", "max_tokens": 1}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    digest = hashlib.sha256("schlüssel".encode()).hexdigest()
    path = tmp_path / "keys"
    path.write_text(f"# who may ask\n\nanna  sesame open\nbert sha256:{digest}\n", encoding="utf-8")
    return path


@pytest.fixture
def http(engine: ScriptedClient, file: Path) -> Iterator[httpx.Client]:
    settings = Settings(served_model_name="words", api_key=("given",), api_key_file=file)
    with running(engine, settings) as url, httpx.Client(base_url=url) as client:
        yield client


def as_key(key: str, encoding: str = "utf-8") -> dict[str, bytes]:
    return {"Authorization": f"Bearer {key}".encode(encoding)}


def test_keys_have_names(file: Path) -> None:
    keys = Keys(["one"], file)
    named = {key: keys.name_of(key.encode()) for key in ("one", "sesame open", "schlüssel", "", "sesame")}
    assert named == {
        "one": "key-1", "sesame open": "anna", "schlüssel": "bert", "": None, "sesame": None
    }  # fmt: skip
    assert keys.name_of("schlüssel".encode("latin-1")) == "bert"
    assert "sesame" not in repr(vars(keys))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("anna\n", "line 1"),
        ("anna one\nanna two\n", "two keys are called anna"),
        ("an na/x: one\nb%d two", "line 2"),
        ("# nobody\n", "has no keys"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(KeysError, match=said):
        Keys(file=path)
    with pytest.raises(KeysError, match="cannot read"):
        Keys(file=tmp_path / "other")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_key_beyond_ascii(http: httpx.Client, encoding: str) -> None:
    assert http.get("/v1/models", headers=as_key("schlüssel", encoding)).status_code == 200
    assert http.get("/v1/models", headers=as_key("schlüssel!", encoding)).status_code == 401


def test_answers_are_counted_by_name(http: httpx.Client) -> None:
    http.post("/v1/completions", json=BODY, headers=as_key("sesame open"))
    http.post("/v1/completions", json={}, headers=as_key("given"))
    text = http.get("/metrics").text
    assert 'api_key_requests_total{api_key="anna",model_name="words",status="200"} 1.0' in text
    assert 'api_key_requests_total{api_key="key-1",model_name="words",status="400"} 1.0' in text
    assert "sesame" not in text


def test_prefixes_are_those_of_a_key(http: httpx.Client, engine: ScriptedClient) -> None:
    for key in ("given", "sesame open", "sesame open"):
        http.post("/v1/completions", json={**BODY, "cache_salt": "s"}, headers=as_key(key))
        http.post("/v1/kv/explain", json={"prompt": "w1"}, headers=as_key(key))
    dropped = http.delete("/v1/kv/prefixes", headers=as_key("sesame open"))
    assert dropped.json() == {"freed_bytes": 4096}
    for key in ("given", "sesame open"):
        http.post("/v1/completions", json={**BODY, "cache_salt": "s"}, headers=as_key(key))
    salts = [request.cache_salt for request in engine.taken if request.id.startswith("cmpl")]
    assert salts[0] == salts[3] and salts[1] == salts[2] and len(set(salts)) == 3
    explained = {request.cache_salt for request in engine.taken if request.id.startswith("explain")}
    assert len(explained) == 2 and not explained & set(salts)


def test_one_key_shares_with_itself_and_drops_everything(engine: ScriptedClient) -> None:
    settings = Settings(served_model_name="words", api_key=("given",))
    with running(engine, settings) as url, httpx.Client(base_url=url, headers=as_key("given")) as http:
        http.post("/v1/completions", json={**BODY, "cache_salt": "s"})
        assert engine.taken[0].cache_salt == "s"
        assert http.delete("/v1/kv/prefixes").json() == {"freed_bytes": 4096}


def test_sequences_are_those_of_a_key(
    http: httpx.Client, engine: ScriptedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = SequenceStats("", 0, "full", 9, 9, 1, 9, 9.0, 100, 100)
    sequences = [replace(sequence, request_id=f"{name}-0", owner=name) for name in ("anna", "key-1")]
    stats = StepStats(2, 0, 0, 100, 0, 1 << 20, sequences=sequences)
    monkeypatch.setattr(ScriptedClient, "stats", stats)
    for key, owner in (("given", "key-1"), ("sesame open", "anna")):
        seen = http.get("/v1/kv/state", headers=as_key(key)).json()
        assert seen["running"] == 2 and [s["request_id"] for s in seen["sequences"]] == [f"{owner}-0"]


def test_places_in_the_queue_are_those_of_a_key(engine: ScriptedClient, file: Path) -> None:
    engine.waits = True
    settings = Settings(served_model_name="words", api_key_file=file, max_waiting_per_key=1)
    with running(engine, settings) as url, httpx.Client(base_url=url) as http, ThreadPoolExecutor() as pool:
        first = pool.submit(http.post, "/v1/completions", json=BODY, headers=as_key("sesame open"))
        while not engine.taken:
            time.sleep(0.01)
        refused = http.post("/v1/completions", json=BODY, headers=as_key("sesame open"))
        assert refused.status_code == 429 and "this API key" in refused.json()["error"]["message"]
        other = pool.submit(http.post, "/v1/completions", json=BODY, headers=as_key("schlüssel"))
        while len(engine.taken) < 2:
            time.sleep(0.01)
        engine.waits = False
        assert first.result().status_code == other.result().status_code == 200
