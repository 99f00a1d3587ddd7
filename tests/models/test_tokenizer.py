"""The default model's tokenizer, and those built from other GGUF vocabularies."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from curkv.models.errors import UnsupportedModel
from curkv.models.loading import load_tokenizer
from curkv.models.loading.gguf_tokenizer import build_tokenizer, write_tokenizer
from curkv.models.loading.pre_tokenizers import PRE_TOKENIZERS

TEXTS = [
    "Hello world",
    "The year 2024 had 366 days, didn't it?  I'll say 3.14159 -- or 1,000,000!",
    "def f(x):\n\treturn x**2  # squared\n\n\nclass A:\n    pass\r\n",
    "naïve café, Ελληνικά, русский, 日本語のテキスト, العربية, 🎉👩‍👩‍👧 e\u0301",
    "   leading and trailing   \n ",
    "<|im_start|>user\nWhat is 12345?<|im_end|>\n<|im_start|>assistant\n",
    "",
    " ",
]
# SmolLM2's vocabulary lacks single tokens for these bytes: six control characters and bytes that no text has.
MISSING_CONTROLS = "\x04\x06\x13\x14\x16\x1d"


@pytest.fixture(scope="module")
def tokenizer(default_model_dir: Path) -> Tokenizer:
    return load_tokenizer(default_model_dir)


@pytest.fixture(scope="module")
def theirs(default_model_dir: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that transformers makes of the same directory."""
    return AutoTokenizer.from_pretrained(default_model_dir)


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class PlainBPE:
    """Byte-level BPE as in the papers, straight from a vocabulary and its merges."""

    def __init__(self, directory: Path):
        model = json.loads((directory / "tokenizer.json").read_text())["model"]
        self.vocabulary: dict[str, int] = model["vocab"]
        self.ranks = {tuple(merge): rank for rank, merge in enumerate(model["merges"])}
        self.alphabet = byte_alphabet()

    def encode(self, text: str) -> list[int]:
        words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        parts = [part for part in regex.split(r"(\p{N})", text) if part]
        pieces = [piece for part in parts for piece in regex.findall(words, part)]
        return [self.vocabulary[token] for piece in pieces for token in self.merge(piece)]

    def merge(self, piece: str) -> list[str]:
        tokens = [self.alphabet[byte] for byte in piece.encode()]
        while len(tokens) > 1:
            pairs = list(pairwise(tokens))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            i = pairs.index(best)
            tokens[i : i + 2] = ["".join(best)]
        return tokens


@pytest.fixture(scope="module")
def plain(default_model_dir: Path) -> PlainBPE:
    return PlainBPE(default_model_dir)


@pytest.mark.parametrize("text", [text for text in TEXTS if "<|" not in text])
def test_ids_are_those_of_plain_bpe(plain: PlainBPE, tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text).ids == plain.encode(text)


def test_known_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("Hello world").ids == [19556, 905]
    assert tokenizer.encode("365").tokens == ["3", "6", "5"]
    assert tokenizer.encode("<|im_start|>user").ids == [1, 4093]
    assert [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_and_transformers_agrees(
    tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast, text: str
) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert theirs(text).input_ids == ids
    assert theirs.decode(ids) == text
    assert (theirs.eos_token, theirs.eos_token_id, theirs.bos_token_id) == ("<|im_end|>", 2, 1)


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", max_codepoint=0x3FFFF, exclude_characters=MISSING_CONTROLS)))
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_chat_template(theirs: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def byte_level_metadata(pre: str, size: int = 262, **changes: Any) -> dict[str, Any]:
    """A byte-level tokenizer of so many tokens; with fewer than all, some bytes have none."""
    others = ["12", "123", "Ġ1", "ab", "<s>", "<user>"]
    tokens = [*list(byte_alphabet().values())[: size - len(others)], *others]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 4],
        "tokenizer.ggml.merges": ["1 2", "12 3", "a b"],
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
    } | changes


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("smollm", ["ab", "1", "2", "3", "4", "<user>"]),
        ("qwen2", ["ab", "1", "2", "3", "4", "<user>"]),
        ("llama-bpe", ["<s>", "ab", "123", "4", "<user>"]),
        ("gpt-2", ["ab", "123", "4", "<user>"]),
    ],
)
def test_pre_tokenizers_split_digits_their_own_way(pre: str, tokens: list[str]) -> None:
    tokenizer = build_tokenizer(byte_level_metadata(pre).get)
    encoding = tokenizer.encode("ab1234<user>")
    assert encoding.tokens == tokens
    assert tokenizer.decode(encoding.ids) == "ab1234<user>"


WORDS = "Hello World's 12345  foo_barBaz\n\n  x — 日本語 naïve ...\r\n\t end  "


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_nothing_is_lost_between_words(name: str) -> None:
    pieces = PRE_TOKENIZERS[name].make().pre_tokenize_str(WORDS)
    assert "".join(WORDS[start:end] for _, (start, end) in pieces) == WORDS
    tokenizer = build_tokenizer(byte_level_metadata(name).get)
    ids = tokenizer.encode(WORDS, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == WORDS


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("default", ["Hello", " World", "'", "s", " ", "123", "45", " ", " foo", "_", "barBaz"]),
        ("gpt-4o", ["Hello", " World's", " ", "123", "45", " ", " foo", "_bar", "Baz"]),
        ("tekken", ["Hello", " World", "'s", " ", "1", "2", "3", "4", "5", " ", " foo", "_bar", "Baz"]),
        ("deepseek-v3", ["Hello", " World", "'s", " ", "123", "45", " ", " foo", "_barBaz"]),
        ("command-r", ["Hello", " World", "'s", " ", "1", "2", "3", "4", "5", " ", " foo", "_", "barBaz"]),
        ("afmoe", ["Hello", " World", "'s", " ", "12", "345", " ", " foo", "_barBaz"]),
        ("viking", ["Hello", " World's", " ", "1", "2", "3", "4", "5", " ", " foo_barBaz"]),
    ],
)
def test_words_are_those_of_the_name(name: str, words: list[str]) -> None:
    pieces = PRE_TOKENIZERS[name].make().pre_tokenize_str(WORDS)
    assert [WORDS[start:end] for _, (start, end) in pieces][: len(words)] == words


def test_bos_follows_the_file() -> None:
    metadata = byte_level_metadata("smollm", **{"tokenizer.ggml.add_bos_token": True})
    assert build_tokenizer(metadata.get).encode("ab").tokens == ["<s>", "ab"]
    metadata = byte_level_metadata("llama-bpe", **{"tokenizer.ggml.add_bos_token": False})
    assert build_tokenizer(metadata.get).encode("ab").tokens == ["ab"]


def sentence_piece_metadata() -> dict[str, Any]:
    pieces = {
        "▁": -9.0,
        "h": -9.0,
        "e": -9.0,
        "l": -9.0,
        "o": -9.0,
        "he": -1.0,
        "ll": -2.0,
        "hell": -3.0,
        "▁hell": -4.0,
    }
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + list(pieces.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_sentence_piece_vocabulary(tmp_path: Path) -> None:
    write_tokenizer(sentence_piece_metadata().get, tmp_path, 128)
    tokenizer = load_tokenizer(tmp_path)
    encoding = tokenizer.encode("hello hellé")
    assert encoding.tokens == ["<s>", "▁hell", "o", "▁hell", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoding.ids) == "hello hellé"
    assert AutoTokenizer.from_pretrained(tmp_path)("hello hellé").input_ids == encoding.ids


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"tokenizer.ggml.pre": "gemma4"}, "gemma4"), ({"tokenizer.ggml.model": "bert"}, "bert")],
)
def test_unknown_tokenizers_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        build_tokenizer(byte_level_metadata("smollm", **changes).get)
