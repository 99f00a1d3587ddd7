"""Text that a model writes itself: calibration without outside data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curkv.models.config import ModelConfig
from curkv.models.pruning.forward import DenseCache, Model

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@torch.inference_mode()
def write_text(
    model: Model,
    sequences: int,
    tokens: int,
    seed: int,
    diverse: bool = False,
    temperature: float = 1.0,
    progress: Progress | None = None,
) -> Tensor:
    """Samples sequences from the model, all of the same length; an end token does not end them.

    Args:
        model: The model.
        sequences: How many.
        tokens: Length of each, the start token included.
        seed: Of the sampling.
        diverse: Follow the start token by one drawn from the vocabulary, so that the texts differ from the
            beginning (LLM-QAT, arXiv 2305.17888, section 3.1).
        temperature: 1 samples from the model's own distribution.
        progress: Told the tokens written of each sequence.

    Returns:
        int64 [sequences, tokens].
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.empty(sequences, tokens, dtype=torch.int64)
    ids[:, 0] = start_token(model.config)
    begun = 1
    if diverse:
        ids[:, 1] = torch.randint(model.config.vocab_size, (sequences,), generator=generator)
        begun = 2
    cache = DenseCache(model.config, sequences, tokens, model.embedding.dtype)
    new = ids[:, :begun]
    for index in range(begun, tokens):
        probabilities = (model.logits(new, cache, last=True)[:, 0] / temperature).softmax(-1)
        new = torch.multinomial(probabilities, 1, generator=generator)
        ids[:, index : index + 1] = new
        if progress:
            progress(index + 1, tokens)
    return ids


def start_token(config: ModelConfig) -> int:
    """Returns the token that a text begins with; models without one begin after the end of another text."""
    return config.bos_token_id if config.bos_token_id is not None else config.eos_token_ids[0]
