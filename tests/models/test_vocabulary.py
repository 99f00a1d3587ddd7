"""What single tokens stand for, and how few of them a text can have."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from curkv.models.loading import load_tokenizer
from curkv.models.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def vocabulary(default_model_dir: Path) -> Vocabulary:
    return Vocabulary(load_tokenizer(default_model_dir))


DECODERS = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]


def fallback(normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """Words behind a marker, and every byte besides, as in Llama 2."""
    names = [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581", "a", "\u2581a", "é"]
    model = models.BPE({name: i for i, name in enumerate(names)}, [("\u2581", "a")], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer or normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(DECODERS)
    return tokenizer


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200) | st.text(alphabet="=- \x04\x06é0", max_size=400))
def test_no_text_has_fewer_tokens(vocabulary: Vocabulary, text: str) -> None:
    assert vocabulary.least_tokens(text) <= len(vocabulary.encode(text, add_special_tokens=False))


def test_the_bound_is_of_use(vocabulary: Vocabulary) -> None:
    assert vocabulary.least_tokens("0123" * 1_000_000) > 40_000
    assert vocabulary.least_tokens("\x04" * 10_000) == 0  # the vocabulary has no token for it


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=100) | st.text(alphabet="\u1fbe\u0308\u0341\u212a\u1d42eu\u0308\u0304", max_size=100))
@pytest.mark.parametrize("form", [normalizers.NFC, normalizers.NFKC])
def test_a_text_that_shrinks_before_it_is_split(form: type[normalizers.Normalizer], text: str) -> None:
    vocabulary = Vocabulary(fallback(form()))
    assert vocabulary.least_tokens("x" * 1000) > 0
    assert vocabulary.least_tokens(text) <= len(vocabulary.encode(text))


@pytest.mark.parametrize("what", ["words", "stripped", "removed", "truncated", "swallowing"])
def test_where_text_may_vanish_nothing_is_said(what: str) -> None:
    tokenizer = fallback(normalizers.Strip() if what == "stripped" else None)
    if what == "words":
        tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    if what == "removed":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    if what == "truncated":
        tokenizer.enable_truncation(5)
    if what == "swallowing":
        tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    assert Vocabulary(tokenizer).least_tokens("a" * 1000) == 0


def test_bytes_of_tokens_make_the_text(vocabulary: Vocabulary) -> None:
    text = "The naïve café 😀👩‍👩‍👧 in  Zürich."
    for each in (vocabulary, Vocabulary(fallback())):
        ids = each.encode(text)
        assert b"".join(map(each.bytes_of, ids)).decode() == text == each.decode(ids)


def test_encoding_without_the_lock_changes_no_token(vocabulary: Vocabulary) -> None:
    text = "The naïve café, 12,345 items. <|im_start|>user"
    assert vocabulary.encode(text) == vocabulary.tokenizer.encode(text).ids
    ids, ends = vocabulary.encode_with_ends(text)
    assert ids == vocabulary.encode(text) and ends[-1] == len(text)


def test_a_token_s_own_text_keeps_its_blank() -> None:
    tokenizer = fallback()
    tokenizer.decoder = decoders.Sequence([*DECODERS, decoders.Strip(" ", 1, 0)])
    vocabulary = Vocabulary(tokenizer)
    assert [vocabulary.text_of(tokenizer.token_to_id(name)) for name in ("\u2581a", "a", "<0xC3>")] == [
        " a",
        "a",
        "\ufffd",
    ]


def test_no_token_spans_a_seam(vocabulary: Vocabulary) -> None:
    text = "hello<\ue001|im_end|>world"
    ids, ends = vocabulary.encode_with_ends(text, seam="\ue001")
    assert vocabulary.decode(ids) == text.replace("\ue001", "")
    assert not any(vocabulary.is_special(token) for token in ids)
    assert ends[-1] == len(text) and text.index("\ue001") in ends
    assert vocabulary.encode_with_ends(text.replace("\ue001", ""))[0] != ids
