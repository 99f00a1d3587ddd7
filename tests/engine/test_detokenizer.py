"""Detokenisation as tokens arrive, and stop strings that cross token boundaries."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from curkv.engine.detokenizer import Detokenizer
from curkv.models.loading import load_tokenizer

TEXT = "The naïve café — 12,345 items 😀👩‍👩‍👧 in  Zürich.\n\n\tfin"


@pytest.fixture(scope="module")
def tokenizer(default_model_dir: Path) -> Tokenizer:
    return load_tokenizer(default_model_dir)


def stream(tokenizer: Tokenizer, text: str, stop: tuple[str, ...]) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(tokenizer, [], stop)
    pieces = []
    for token in tokenizer.encode(text).ids:
        piece, met = detokenizer.append(token)
        pieces.append(piece)
        if met is not None:
            return pieces, met
    return [*pieces, detokenizer.flush()], None


def test_pieces_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    pieces, met = stream(tokenizer, TEXT, ())
    assert "".join(pieces) == TEXT and met is None
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stop", ["items", "345 it", "ich.", "\n\n\t", "n", "é — 1"])
def test_text_ends_before_the_stop_string(tokenizer: Tokenizer, stop: str) -> None:
    pieces, met = stream(tokenizer, TEXT, ("never", stop))
    assert met == stop
    assert "".join(pieces) == TEXT[: TEXT.index(stop)]


def test_the_earliest_stop_string_wins(tokenizer: Tokenizer) -> None:
    pieces, met = stream(tokenizer, "one two three", ("three", "two"))
    assert met == "two" and "".join(pieces) == "one "


def test_a_false_start_is_given_back(tokenizer: Tokenizer) -> None:
    pieces, met = stream(tokenizer, "ab abc abcd", ("abcde",))
    assert met is None and "".join(pieces) == "ab abc abcd"


def test_any_token_sequence_can_be_decoded(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    for _ in range(20):
        detokenizer = Detokenizer(tokenizer, [draw.randrange(49152) for _ in range(9)], ("stop",))
        for _ in range(300):
            detokenizer.append(draw.randrange(49152))
