"""Detokenisation as tokens arrive, and stop strings that cross token boundaries."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curkv.engine.detokenizer import Detokenizer
from curkv.models.loading import load_tokenizer
from curkv.models.vocabulary import Vocabulary
from tests.models.test_vocabulary import fallback

TEXT = "The naïve café — 12,345 items 😀👩‍👩‍👧 in  Zürich.\n\n\tfin"


@pytest.fixture(scope="module")
def vocabulary(default_model_dir: Path) -> Vocabulary:
    return Vocabulary(load_tokenizer(default_model_dir))


def stream(vocabulary: Vocabulary, text: str, stop: tuple[str, ...]) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(vocabulary, [], stop)
    pieces = []
    for token in vocabulary.encode(text):
        piece, met = detokenizer.append(token)
        pieces.append(piece)
        if met is not None:
            return pieces, met
    return [*pieces, detokenizer.flush()], None


def test_pieces_add_up_to_the_text(vocabulary: Vocabulary) -> None:
    pieces, met = stream(vocabulary, TEXT, ())
    assert "".join(pieces) == TEXT and met is None
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stop", ["items", "345 it", "ich.", "\n\n\t", "n", "é — 1"])
def test_text_ends_before_the_stop_string(vocabulary: Vocabulary, stop: str) -> None:
    pieces, met = stream(vocabulary, TEXT, ("never", stop))
    assert met == stop
    assert "".join(pieces) == TEXT[: TEXT.index(stop)]


def test_the_stop_string_may_be_part_of_the_text(vocabulary: Vocabulary) -> None:
    detokenizer = Detokenizer(vocabulary, [], ("items",), include_stop=True)
    pieces = [detokenizer.append(token) for token in vocabulary.encode(TEXT)]
    end = next(i for i, (_, stop) in enumerate(pieces) if stop is not None)
    assert "".join(text for text, _ in pieces[: end + 1]) == TEXT[: TEXT.index("items") + len("items")]


def test_the_earliest_stop_string_wins(vocabulary: Vocabulary) -> None:
    pieces, met = stream(vocabulary, "one two three", ("three", "two"))
    assert met == "two" and "".join(pieces) == "one "


def test_a_false_start_is_given_back(vocabulary: Vocabulary) -> None:
    pieces, met = stream(vocabulary, "ab abc abcd", ("abcde",))
    assert met is None and "".join(pieces) == "ab abc abcd"


def test_any_token_sequence_can_be_decoded(vocabulary: Vocabulary) -> None:
    draw = random.Random(0)
    for _ in range(20):
        detokenizer = Detokenizer(vocabulary, [draw.randrange(49152) for _ in range(9)], ("stop",))
        for _ in range(300):
            detokenizer.append(draw.randrange(49152))


def continued(vocabulary: Vocabulary, prompt: list[int], ids: list[int]) -> str:
    detokenizer = Detokenizer(vocabulary, prompt)
    return "".join(detokenizer.append(token)[0] for token in ids)


@pytest.mark.parametrize("kind", ["bytes of the vocabulary", "bytes as a fallback"])
def test_a_prompt_that_ends_in_an_unknown_character_does_not_come_back(
    vocabulary: Vocabulary, kind: str
) -> None:
    used = vocabulary if kind == "bytes of the vocabulary" else Vocabulary(fallback())
    prompt = used.encode("The word is caf\ufffd")
    assert continued(used, prompt, used.encode("a a")) == "a a"


def test_a_prompt_that_ends_within_a_character(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode("😀")
    assert len(ids) > 1
    assert continued(vocabulary, ids[:-1], [ids[-1], *vocabulary.encode(" yes")]) == "😀 yes"
    assert continued(vocabulary, ids[:-1], vocabulary.encode("yes")) == "yes"


@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4))
def test_stop_strings_are_those_that_a_search_finds(text: str, stops: list[str]) -> None:
    vocabulary = Vocabulary(fallback())
    ids = [token for character in text for token in vocabulary.encode(character)]
    detokenizer, pieces, met = Detokenizer(vocabulary, [], tuple(stops)), [], None
    for token in ids:
        piece, met = detokenizer.append(token)
        pieces.append(piece)
        if met is not None:
            break
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert met is None and "".join(pieces) + detokenizer.flush() == text
    else:
        ended = text[: min(ends)]
        assert met in stops and "".join(pieces) + met == ended
