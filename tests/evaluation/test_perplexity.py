"""Perplexity, KL and top-1 agreement against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from curkv.evaluation.perplexity import agreement, compare, perplexity, token_windows


def constant(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities).log()


def test_agreement_of_two_known_distributions() -> None:
    p, q = constant(0.5, 0.25, 0.25), constant(0.25, 0.5, 0.25)
    result = agreement(torch.stack([p, p]), torch.stack([q, p]), torch.tensor([0, 2]))
    assert result.nll.tolist() == pytest.approx([math.log(4), math.log(4)])
    assert result.kl.tolist() == pytest.approx([0.5 * math.log(2) - 0.25 * math.log(2), 0], abs=1e-6)
    assert result.top1.tolist() == [False, True]


def test_a_model_beside_itself_and_beside_a_uniform_one() -> None:
    def model(ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot((ids + 1) % 4, 4).float()

    def uniform(ids: Tensor) -> Tensor:
        return torch.zeros(len(ids), 4)

    windows = [torch.tensor([0, 1, 2, 3, 0]), torch.tensor([2, 3, 0])]
    right = math.e / (math.e + 3)
    assert perplexity(model, windows) == pytest.approx(1 / right)
    same = compare(model, model, windows)
    assert (same.tokens, same.ratio, same.kl, same.top1) == (6, 1, pytest.approx(0, abs=1e-6), 1)
    other = compare(model, uniform, windows)
    assert other.perplexity == pytest.approx(4) and other.reference_perplexity == pytest.approx(1 / right)


def test_windows_are_drawn_without_overlap(tokenizer: Tokenizer) -> None:
    text = "".join(map(chr, range(40, 100)))
    windows = token_windows(tokenizer, text, 10, 6)
    assert windows.flatten().tolist() == tokenizer.encode(text).ids
    assert token_windows(tokenizer, text, 10, 3, seed=1).shape == (3, 10)
    with pytest.raises(ValueError, match="6 windows of 10 tokens, 7 are wanted"):
        token_windows(tokenizer, text, 10, 7)
