"""Text that a model writes itself: calibration without outside data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from curkv.models.config import ModelConfig
from curkv.models.dense import DenseCache
from curkv.models.pruning.forward import Model
from curkv.models.pruning.plan import PruningError

TEXT_FILE = "self_text.json"

CACHE_BYTES = 4 << 30
"""Most that the keys and values of texts written at once may take; the others wait."""


@dataclass(frozen=True, slots=True)
class Writing:
    """How a model writes.

    Attributes:
        sequences: Texts.
        tokens: Length of each, the start token included; an end token does not end it.
        diverse: Follow the start token by one drawn from the vocabulary, so that the texts differ from the
            beginning (LLM-QAT, arXiv 2305.17888, section 3.1).
        temperature: 1 samples from the model's own distribution.
    """

    sequences: int = 256
    tokens: int = 256
    diverse: bool = True
    temperature: float = 1.0


@torch.inference_mode()
def write_text(
    model: Model, writing: Writing, seed: int, progress: Callable[[int, int], None] = lambda *_: None
) -> Tensor:
    """Samples texts from a model.

    Args:
        model: The model.
        writing: How many, how long, how.
        seed: Of the sampling.
        progress: Called with the steps done, and with all of them.

    Returns:
        int64 [sequences, tokens].
    """
    sequences, tokens = writing.sequences, writing.tokens
    generator = torch.Generator().manual_seed(seed)
    ids = torch.empty(sequences, tokens, dtype=torch.int64)
    ids[:, 0] = start_token(model.config)
    begun = 1
    if writing.diverse:
        ids[:, 1] = torch.randint(model.config.vocab_size, (sequences,), generator=generator)
        begun = 2
    groups = torch.split(ids, texts_at_once(model.config, tokens, CACHE_BYTES))
    for number, group in enumerate(groups):
        cache = DenseCache(model.config, len(group), tokens, model.embedding.dtype)
        new = group[:, :begun]
        for index in range(begun, tokens):
            new = _draw(model.logits(new, cache, last=True)[:, 0] / writing.temperature, generator)
            group[:, index : index + 1] = new
            progress(number * tokens + index + 1, len(groups) * tokens)
    return ids


def texts_at_once(config: ModelConfig, tokens: int, cache_bytes: int) -> int:
    """Returns for how many texts of so many tokens float32 keys and values fit, at least one."""
    return max(1, cache_bytes // (8 * config.num_layers * config.kv_size * tokens))


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a token for each row of [B, vocab] by inverting its distribution function; int64 [B, 1]."""
    cumulative = logits.softmax(-1).cumsum(-1)
    uniform = torch.rand(len(logits), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, uniform, right=True).clamp_max(logits.shape[1] - 1)


def start_token(config: ModelConfig) -> int:
    """Returns the token that a text begins with; models without one begin after the end of another text."""
    return config.bos_token_id if config.bos_token_id is not None else config.eos_token_ids[0]


def save_text(token_ids: Tensor, path: Path) -> None:
    """Writes texts, int64 [sequences, tokens], for `load_text`."""
    path.write_text(json.dumps({"token_ids": token_ids.tolist()}), encoding="utf-8")


def load_text(path: Path, vocab_size: int) -> Tensor:
    """Reads texts.

    Raises:
        PruningError: The file is missing, is no text, or is that of a model with another vocabulary.
    """
    try:
        ids = torch.tensor(json.loads(path.read_text(encoding="utf-8"))["token_ids"], dtype=torch.int64)
        if ids.dim() != 2 or len(ids) < 2 or not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(f"expected two texts or more of equal length, token ids below {vocab_size}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise PruningError(f"{path} is no text of this model: {error}") from error
    return ids
