"""What a tokenizer's tokens stand for: bytes and text of each, and how few a text can have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_START = "\u2581"
_SHRINKING = {"NFC": 4, "NFD": 4, "NFKC": 8, "NFKD": 8, "Lowercase": 4, "Prepend": 1}
"""Bytes of a text that may become one, by kind of normalizer; NFC's worst is 3.5 (U+1FBE U+0308 U+0341)."""
_KEEPING = frozenset({"ByteLevel", "Digits", "Split", "Metaspace"})
"""Kinds of pre-tokenizers that drop nothing, `Split` unless it is told to."""


def _byte_alphabet() -> dict[str, int]:
    """Character to byte of byte-level vocabularies, as in GPT-2."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()
_FALLBACK = {byte: f"<0x{byte:02X}>" for byte in range(0x100)}
_IN_TEXT = [byte for byte in range(0x100) if byte not in (0xC0, 0xC1, *range(0xF5, 0x100))]
"""Bytes that occur in UTF-8."""


class Vocabulary:
    """A tokenizer, and its tokens one by one. All methods may be called from any thread.

    Encoding and decoding release the interpreter's lock, which `Tokenizer.encode` and `decode` hold: a text
    of megabytes must not hold up the event loop or the engine.

    Attributes:
        tokenizer: the tokenizer.
        bytewise: whether the text of tokens is the concatenation of each token's bytes.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        decoders = [part["type"] for part in _parts(tokenizer.decoder, "decoders")]
        self._byte_level = decoders == ["ByteLevel"]
        self.bytewise = self._byte_level or ("ByteFallback" in decoders and "Replace" in decoders)
        self._added_tokens = tokenizer.get_added_tokens_decoder()
        self._texts: dict[int, str] = {}
        self._pieces: dict[int, bytes] = {}

    @property
    def size(self) -> int:
        """Token ids of the tokenizer, added ones included, are below it."""
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text."""
        [encoding] = self.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def encode_with_ends(
        self, text: str, add_special_tokens: bool = False, seam: str | None = None
    ) -> tuple[list[int], list[int]]:
        """The tokens of a text, and in which character each ends.

        Args:
            text: the text.
            add_special_tokens: whether it gets the tokens that the tokenizer begins a text with.
            seam: a character that is not read, and that no token spans; None: there is none.
        """
        first, *rest = text.split(seam) if seam is not None else [text]
        encodings = self.tokenizer.encode_batch([first], add_special_tokens=add_special_tokens)
        encodings += self.tokenizer.encode_batch(rest, add_special_tokens=False)
        ids: list[int] = []
        ends: list[int] = []
        start = 0
        for piece, encoding in zip((first, *rest), encodings, strict=True):
            ids += encoding.ids
            ends += [start + end for _, end in encoding.offsets]
            start += len(piece) + 1
        return ids, ends

    @cached_property
    def special_texts(self) -> re.Pattern[str] | None:
        """Finds the text of special tokens, which a text would be read as; None if there are none."""
        texts = [token.content for token in self._added_tokens.values() if token.special]
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        [text] = self.tokenizer.decode_batch([list(token_ids)], skip_special_tokens=False)
        return str(text)

    def text_of(self, token_id: int) -> str:
        """A token's own text: bytes of a character that is split over tokens show as U+FFFD."""
        if (text := self._texts.get(token_id)) is None:
            text = self._texts[token_id] = self._text(token_id)
        return text

    def bytes_of(self, token_id: int) -> bytes:
        """A token's bytes, of which a character may have more; those of its text if they are not known."""
        if (piece := self._pieces.get(token_id)) is None:
            piece = self._pieces[token_id] = self._piece(token_id)
        return piece

    def is_special(self, token_id: int) -> bool:
        """Whether a token marks something and is left out of an answer's text."""
        return token_id in self._added_tokens and self._added_tokens[token_id].special

    def _text(self, token_id: int) -> str:
        if self.bytewise:  # decoders strip the first space of a text
            return self.bytes_of(token_id).decode(errors="replace")
        return self._decoded(token_id)

    def _piece(self, token_id: int) -> bytes:
        if (added := self._added_tokens.get(token_id)) is not None:
            return str(added.content).encode()
        name = self.tokenizer.id_to_token(token_id)
        if name is None or not self.bytewise:
            return self._decoded(token_id).encode()
        if self._byte_level:
            known = [_BYTES[character] for character in name if character in _BYTES]
            return bytes(known) if len(known) == len(name) else self._decoded(token_id).encode()
        if (byte := _BYTE_TOKEN.fullmatch(name)) is not None:
            return bytes.fromhex(byte[1])
        return _spaced(name).encode()

    def _decoded(self, token_id: int) -> str:
        return str(self.tokenizer.decode([token_id], skip_special_tokens=False))

    def least_tokens(self, text: str) -> int:
        """Tokens that the text has at least, found without tokenizing it; 0 if nothing can be said.

        A token stands for at most as many bytes as the longest of the vocabulary, if the tokenizer drops and
        merges nothing on the way but bytes that the vocabulary lacks.
        """
        if (bound := self._bound) is None:
            return 0
        longest, dropped = bound
        return -(-len(text.encode().translate(None, dropped)) // longest)

    @cached_property
    def _bound(self) -> tuple[int, bytes] | None:
        """Bytes of a text that one token can stand for, and the bytes that get none; None: no bound."""
        shrinking, model, added = 1, self.tokenizer.model, self._added_tokens.values()
        for part in _parts(self.tokenizer.normalizer, "normalizers"):
            if (factor := _shrinking(part)) is None:
                return None
            shrinking *= factor
        splits = list(_parts(self.tokenizer.pre_tokenizer, "pretokenizers"))
        dropping = any(s["type"] not in _KEEPING or s.get("behavior") == "Removed" for s in splits)
        if dropping or self.tokenizer.truncation or any(token.lstrip or token.rstrip for token in added):
            return None
        byte_level = any(split["type"] == "ByteLevel" for split in splits)
        if not isinstance(model, BPE) or not (byte_level or model.byte_fallback):
            return None
        names = {byte: name for name, byte in _BYTES.items()} if byte_level else _FALLBACK
        dropped = bytes(byte for byte in _IN_TEXT if model.token_to_id(names[byte]) is None)
        if dropped and (shrinking > 1 or model.unk_token is not None):  # any length of them may be one token
            return None
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        shown = map(len, vocabulary) if byte_level else (len(_spaced(name).encode()) for name in vocabulary)
        return shrinking * max(*shown, *(len(token.content.encode()) for token in added)), dropped


def _spaced(name: str) -> str:
    return name.replace(_WORD_START, " ")


def _parts(component: Any, members: str) -> Iterator[dict[str, Any]]:
    """Parts of a normalizer, pre-tokenizer or decoder as in tokenizer.json, sequences laid flat."""
    if component is None:
        return
    pending = [json.loads(component.__getstate__())]
    while pending:
        part = pending.pop(0)
        if part["type"] == "Sequence":
            pending = [*part[members], *pending]
        else:
            yield part


def _shrinking(normalizer: dict[str, Any]) -> int | None:
    """How many bytes may become one; None if any number may."""
    if normalizer["type"] != "Replace":
        return _SHRINKING.get(normalizer["type"])
    pattern, content = normalizer["pattern"].get("String"), normalizer["content"].encode()
    return -(-len(pattern.encode()) // len(content)) if pattern and content else None
