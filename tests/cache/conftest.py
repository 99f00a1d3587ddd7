from __future__ import annotations

import pydoc_data.topics

import pytest
import torch
from torch import Tensor

from curkv.models.errors import ModelNotFound
from curkv.models.loading import resolve_model


@pytest.fixture(scope="session")
def real_kv() -> tuple[Tensor, Tensor]:
    """Keys (after RoPE) and values of the default model on real text, [30, 3, 1031, 64] each."""
    from tokenizers import Tokenizer

    from curkv.bench import baseline

    try:
        directory = resolve_model("smollm2-135m-instruct")
    except ModelNotFound as error:
        pytest.skip(str(error))
    text = pydoc_data.topics.topics["typesmapping"] + pydoc_data.topics.topics["numeric-types"]
    tokens = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids[:1031]
    assert len(tokens) == 1031
    model = baseline.load(directory)
    with torch.inference_mode():
        layers = model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1).past_key_values.layers
    keys, values = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("keys", "values"))
    return keys.clone(), values.clone()
