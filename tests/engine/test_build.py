"""Engines built from options: the type of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from curkv.cache.parsing import parse_options
from curkv.config import EngineOptions, Weights
from curkv.engine.build import build_engine
from curkv.evaluation.perplexity import compare, dense_logits, token_windows

from .conftest import Loaded, request, run, tokens


@pytest.mark.parametrize(("weights", "share"), [("int8", 0.26), ("int4", 0.19)])
def test_rounded_weights_predict_as_float32_ones_do(loaded: Loaded, weights: Weights, share: float) -> None:
    """The default model was published in 4 bits: for it, int4 rounds nothing but activations."""
    engine = build_engine(
        EngineOptions(
            model=str(loaded.directory), weights=weights, kv_cache_memory=1 << 26, prefix_cache_memory=0
        )
    )
    assert engine.runner.model.weights == weights
    linear = {"attention", "mlp", "head"}
    rounded, exact = (
        sum(m.weights_bytes[kind] for kind in linear) for m in (engine.runner.model, loaded.model)
    )
    assert rounded < share * exact
    text = loaded.tokenizer.decode(loaded.text_ids[2000:3000])
    windows = token_windows(loaded.tokenizer, text, 300, 1)
    found = compare(dense_logits(loaded.model), dense_logits(engine.runner.model), windows)
    assert found.ratio < 1.02
    assert found.kl < 0.02
    together = run(engine, *(request(loaded.prompt(n), id=str(n)) for n in (20, 90)))
    for n in (20, 90):
        assert tokens(run(engine, request(loaded.prompt(n), id="alone"))["alone", 0]) == tokens(
            together[str(n), 0]
        )


@pytest.mark.parametrize("weights", ["float32", "published", "int4"])
def test_weights_of_a_cpu_are_refused_on_a_gpu(
    default_model_dir: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = EngineOptions(model=str(default_model_dir), weights=weights, device="cuda", kernels="reference")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights on a GPU are bfloat16, fp8, int8"):
        build_engine(options)


def test_a_prefix_store_outlives_the_engine(default_model_dir: Path, loaded: Loaded, tmp_path: Path) -> None:
    """A start finds what the one before has left, under the same weights alone."""
    kv = parse_options({"policy": "curdkv", "budget": "25%", "context_tokens": "200"})
    cached = []
    for weights in ("int8", "int8", "int4"):
        options = EngineOptions(
            model=str(default_model_dir), weights=weights, kv_cache_memory=1 << 27, prefix_store=tmp_path
        )
        engine = build_engine(options)
        [outputs] = run(engine, request(loaded.prompt(230), kv=kv)).values()
        cached.append(outputs[-1].cached_tokens)
        engine.close(10)
    assert cached == [0, 200, 0] and len(list(tmp_path.iterdir())) == 2
