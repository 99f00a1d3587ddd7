"""How well a model predicts held-out text, alone (perplexity) and beside another (KL, top-1 agreement)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curkv.cache.batch import Batch
from curkv.models.decoder import Decoder
from curkv.models.dense import DenseAttention
from curkv.models.rope import rope_tables

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Logits = Callable[[Tensor], Tensor]
"""A model as seen here: token ids int64 [n] to float32 logits [n, vocab], row i predicting token i + 1."""


@dataclass(frozen=True)
class Agreement:
    """Predictions for the same n tokens by a model and by the reference it is held against.

    Attributes:
        nll: float32 [n], -ln of the probability that the model gives to each token.
        kl: float32 [n], KL(reference || model) of the two distributions, in nats.
        top1: bool [n], whether both find the same token likeliest.
    """

    nll: Tensor
    kl: Tensor
    top1: Tensor


@dataclass(frozen=True)
class Comparison:
    """A model beside its reference over windows of text.

    Attributes:
        tokens: Tokens predicted.
        reference_perplexity: exp of the reference's mean NLL per token.
        perplexity: exp of the model's.
        kl: Mean KL(reference || model) per token, in nats.
        top1: Share of the tokens for which both find the same token likeliest.
    """

    tokens: int
    reference_perplexity: float
    perplexity: float
    kl: float
    top1: float

    @property
    def ratio(self) -> float:
        """Perplexity relative to the reference's; 1 is no loss."""
        return self.perplexity / self.reference_perplexity


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Gives -ln p of each target: float32 [n] from logits [n, vocab] and token ids int64 [n]."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def agreement(reference: Tensor, logits: Tensor, targets: Tensor) -> Agreement:
    """Compares two models' predictions of the same tokens.

    Args:
        reference: float32 [n, vocab], logits of the reference.
        logits: float32 [n, vocab], logits of the model.
        targets: int64 [n], the tokens that came.
    """
    log_p, log_q = (torch.log_softmax(x.float(), dim=-1) for x in (reference, logits))
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    nll = -log_q.gather(1, targets[:, None]).squeeze(1)
    return Agreement(nll, kl, reference.argmax(dim=-1) == logits.argmax(dim=-1))


def token_windows(tokenizer: Tokenizer, text: str, length: int, count: int, seed: int = 0) -> Tensor:
    """Draws windows of a text that do not overlap.

    Args:
        tokenizer: Of the model.
        text: Held-out text, see `curkv.evaluation.corpora`.
        length: Tokens of a window.
        count: Windows.
        seed: Chooses which.

    Returns:
        int64 [count, length].

    Raises:
        ValueError: The text is too short.
    """
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    available = len(ids) // length
    if count > available:
        raise ValueError(f"the text has {available} windows of {length} tokens, {count} are wanted")
    chosen = sorted(random.Random(seed).sample(range(available), count))
    return ids[: available * length].view(available, length)[chosen]


@torch.inference_mode()
def perplexity(model: Logits, windows: Iterable[Tensor]) -> float:
    """Returns exp of the mean NLL per token; each window's first token is context only.

    Args:
        model: The model.
        windows: int64 [length] each, see `token_windows`.
    """
    nll = [token_nll(model(ids)[:-1], ids[1:]) for ids in windows]
    return math.exp(torch.cat(nll).mean().item())


@torch.inference_mode()
def compare(reference: Logits, model: Logits, windows: Iterable[Tensor]) -> Comparison:
    """Holds a model against its reference on the same windows.

    Args:
        reference: What the model should be like: before pruning, before quantisation, with the full cache.
        model: The model.
        windows: int64 [length] each; wrap them in tqdm for a progress bar.
    """
    parts, reference_nll = [], []
    for ids in windows:
        expected, targets = reference(ids)[:-1], ids[1:]
        parts.append(agreement(expected, model(ids)[:-1], targets))
        reference_nll.append(token_nll(expected, targets))
    return Comparison(
        tokens=sum(len(part.nll) for part in parts),
        reference_perplexity=math.exp(torch.cat(reference_nll).mean().item()),
        perplexity=math.exp(torch.cat([part.nll for part in parts]).mean().item()),
        kl=torch.cat([part.kl for part in parts]).mean().item(),
        top1=torch.cat([part.top1 for part in parts]).float().mean().item(),
    )


def dense_logits(model: Decoder) -> Logits:
    """A model without a paged cache: one causal pass per window, logits of every token."""
    attention = DenseAttention(model.config, rope_tables(model.config))

    def logits(ids: Tensor) -> Tensor:
        batch = Batch.build([0], [ids.tolist()], [0])
        return model.forward(replace(batch, logit_rows=torch.arange(len(ids))), attention)

    return logits
