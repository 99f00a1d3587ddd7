r"""How byte-level BPE cuts text into words: every way that llama.cpp has a name for, done by `tokenizers`.

A way is a list of expressions. Each cuts all pieces that those before it have made, into what it matches and
what lies between. Names and expressions: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp,
which adapts some to its own engine; here they are those of the models' `tokenizer.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HAN, _CJK = r"[一-龥ࠀ-一가-퟿]+", r"[一-龥぀-ゟ゠-ヿ]+"
_ASCII_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+"
)
_PHRASES = r" ?[^(\s|.,!?…。，、।۔،)]+"
_FEW_DIGITS = r"\d{1,3}(?=(?:\d{3})*\b)"


def _gpt4(
    digits: str, before: str = f"{_CONTRACTIONS}|", spaces: str = _SPACES, ends: str = r"[\r\n]*"
) -> str:
    """GPT-4's words; `digits` says how many may stay together, `ends` what goes with marks."""
    return rf"{before}[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+{ends}|{spaces}"


def _gpt4o(digits: str, contractions: str = f"{_CONTRACTIONS}?") -> str:
    """GPT-4o's words, which end before a capital."""
    edge = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{edge}{_UPPER}*{_LOWER}+{contractions}|{edge}{_UPPER}+{_LOWER}*{contractions}|"
        rf"\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_CASCADE = "|".join(
    rf"\s{{{count}}}(?!\S)" for count in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")
)
_KIMI_EDGE = r"[^\r\n\p{L}\p{N}]?"
_KIMI_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI = (
    rf"[\p{{Han}}]+|{_KIMI_EDGE}{_KIMI_UPPER}*{_KIMI_LOWER}+{_CONTRACTIONS}?|"
    rf"{_KIMI_EDGE}{_KIMI_UPPER}+{_KIMI_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
    rf"{_SPACES}"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut into the words that merges happen within.

    Attributes:
        splits: Expressions, applied one after the other.
        normalizer: What is done to the text before.
        adds_bos: The bos token is put first unless the file says otherwise.
        whole_words: Words that are tokens are not merged.
    """

    splits: tuple[str, ...]
    normalizer: Callable[[], normalizers.Normalizer] | None = None
    adds_bos: bool = False
    whole_words: bool = False

    def make(self) -> pre_tokenizers.PreTokenizer:
        """Cuts, and maps to bytes."""
        return pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in self.splits),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )


_WAYS: tuple[tuple[tuple[str, ...], PreTokenizer], ...] = (
    (("default",), PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
    (
        (
            *(
                "gpt-2",
                "phi-2",
                "gigachat",
                "a.x-4.0",
                "mellum",
                "modern-bert",
                "exaone4",
                "mpt",
                "olmo",
                "jais",
            ),
            *("jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en", "jina-v2-code", "roberta-bpe"),
            *("jais", "trillion", "granite-docling"),
        ),
        PreTokenizer((_GPT2,)),
    ),
    (
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        PreTokenizer((r"\p{N}", _GPT2)),
    ),
    (
        (
            *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
            "jina-v5-nano",
        ),
        PreTokenizer((_gpt4("{1,3}"),), adds_bos=True, whole_words=True),
    ),
    (("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), PreTokenizer((_gpt4("{1,3}"),))),
    (("minicpm5",), PreTokenizer((r"\p{N}{1,3}", _gpt4("+")), whole_words=True)),
    (("jais-2",), PreTokenizer((_gpt4("{1,3}", spaces=rf"\s*[\r\n]+|{_CASCADE}|\s{{1}}"),))),
    (
        ("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"),
        PreTokenizer((_gpt4(""),), normalizers.NFC),
    ),
    (("stablelm2", "hunyuan", "solar-open", "grok-2"), PreTokenizer((_gpt4(""),))),
    (
        ("qwen35",),
        PreTokenizer(
            (
                rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
                rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
            ),
            normalizers.NFC,
        ),
    ),
    (("ufakzeka",), PreTokenizer((_gpt4("", before=""),))),
    (("seed-coder",), PreTokenizer((_gpt4("").replace(r"]+[\r\n]*", r"\r\n]+"),))),
    (("laguna",), PreTokenizer((r"[^\n]+|[\n]+", _gpt4("")))),
    (
        ("bailingmoe", "bailingmoe2", "llada-moe"),
        PreTokenizer(
            (_gpt4("", before=r"'(?i:[sdmt]|ll|ve|re)|", spaces=r"\s*[\r\n]|\s+(?!\S)|\s+"),),
        ),
    ),
    (
        ("exaone-moe",),
        PreTokenizer(
            (
                rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    (("tekken",), PreTokenizer((_gpt4o("", ""),), adds_bos=True, whole_words=True)),
    (("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), PreTokenizer((_gpt4o("{1,3}"),))),
    (("granite-embed-multi-97m",), PreTokenizer((_gpt4o("{1,3}"),), whole_words=True)),
    (("tiny_aya", "cohere2moe"), PreTokenizer((_FEW_DIGITS, _gpt4o("{1,3}")))),
    (("kimi-k2",), PreTokenizer((_KIMI,))),
    (
        ("youtu",),
        PreTokenizer(
            (r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+", _gpt4o("")),
            whole_words=True,
        ),
    ),
    (
        ("deepseek-llm",),
        PreTokenizer(
            (
                r"[\r\n]",
                r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
                r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
                r"\s+$",
                _HAN,
                r"\p{N}+",
            )
        ),
    ),
    (("deepseek-coder",), PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}"))),
    (
        ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
        PreTokenizer((r"\p{N}{1,3}", _CJK, rf"{_ASCII_WORDS}[\r\n]*|{_SPACES}")),
    ),
    (
        ("spark2_5",),
        PreTokenizer((r"\p{N}{1,3}", _CJK, rf"{_ASCII_WORDS}|[\r\n]|\s+(?!\S)|\s+", r"\p{N}")),
    ),
    (
        ("afmoe",),
        PreTokenizer(
            (
                _FEW_DIGITS,
                r"[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
                rf"{_ASCII_WORDS}[\r\n]*|{_SPACES}",
            )
        ),
    ),
    (("falcon",), PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    (("bloom", "poro-chat", "gpt3-finnish"), PreTokenizer((_PHRASES,))),
    (("viking",), PreTokenizer((_PHRASES, r"\p{N}"))),
    (("superbpe",), PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))"))),
    (
        ("chameleon",),
        PreTokenizer(
            (
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            adds_bos=True,
        ),
    ),
)

PRE_TOKENIZERS = {name: way for names, way in _WAYS for name in names}
"""By `tokenizer.ggml.pre`. Of llama.cpp's names those are missing that are not byte-level."""
