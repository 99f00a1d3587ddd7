"""How text is cut into words for byte-level BPE, in the ways that several vocabularies share."""

from __future__ import annotations

from tokenizers import Regex, pre_tokenizers

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def digits_and_bytes() -> pre_tokenizers.PreTokenizer:
    """GPT-2's words, and every digit alone."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def words_and_bytes(digits: str) -> pre_tokenizers.PreTokenizer:
    """GPT-4's words; `digits` says how many may stay together, as the end of a regular expression."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS % digits), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
