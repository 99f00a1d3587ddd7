"""Embeddings: the mean of a prompt's last hidden states, whatever its chunks and its company."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from curkv.engine.engine import Engine
from curkv.models.dense import DenseAttention
from curkv.models.rope import rope_tables

from .conftest import Loaded, request, run, tokens

MakeEngine = Callable[..., Engine]


def embedded(engine: Engine, *prompts: list[int]) -> list[list[float]]:
    asked = [request(prompt, 0, f"e{i}", embed=True) for i, prompt in enumerate(prompts)]
    found = run(engine, *asked)
    return [found[f"e{i}", 0][-1].embedding for i in range(len(prompts))]


def test_the_mean_of_the_states_that_the_head_reads(make_engine: MakeEngine, loaded: Loaded) -> None:
    prompt = loaded.prompt(70)
    [vector] = embedded(make_engine(), prompt)
    model = loaded.model
    batch = type("Batch", (), {"token_ids": torch.tensor(prompt), "logit_rows": torch.tensor([69])})()
    attention = DenseAttention(model.config, rope_tables(model.config, len(prompt)))
    _, states = model.forward_with_states(batch, attention)
    assert np.allclose(vector, states.mean(0).numpy(), atol=2e-3)


def test_chunks_prefixes_and_company_change_nothing(make_engine: MakeEngine, loaded: Loaded) -> None:
    prompts = [loaded.prompt(70), loaded.prompt(1), loaded.prompt(40, start=9)]
    whole = embedded(make_engine(), *prompts)
    engine = make_engine(max_step_tokens=32)
    free = request(loaded.prompt(70), 12, "free")
    alone = tokens(run(engine, free)["free", 0])
    asked = [request(prompt, 0, f"e{i}", embed=True) for i, prompt in enumerate(prompts)]
    found = run(engine, request(loaded.prompt(70), 12, "again"), *asked)
    assert tokens(found["again", 0]) == alone
    for i, expected in enumerate(whole):
        assert found[f"e{i}", 0][-1].embedding == pytest.approx(expected, abs=2e-3)
