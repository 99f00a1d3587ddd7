"""The tokenizer inside a GGUF file, as `tokenizer.json` and `tokenizer_config.json`.

It is built from the file's own vocabulary and merges. The converter of transformers 5 names a wrong class and
a wrong end token for some files (SmolLM2 among them), after which text is split in ways the model never saw.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from curkv.models.errors import ModelError, UnsupportedModel
from curkv.models.loading.pre_tokenizers import PRE_TOKENIZERS

Metadata = Callable[[str], Any]

# Values of `tokenizer.ggml.token_type`.
CONTROL, USER_DEFINED = 3, 4

_SPACE = "▁"


def write_tokenizer(metadata: Metadata, directory: Path, max_positions: int) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`.

    Args:
        metadata: Returns the value of a GGUF key, or None.
        directory: Where to write.
        max_positions: The model's context length, in tokens.
    """
    build_tokenizer(metadata).save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }
    tokens = _required(metadata, "tokens")
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        id = metadata(f"tokenizer.ggml.{key}_token_id")
        if id is not None:
            config[f"{name}_token"] = tokens[id]
    if template := metadata("tokenizer.chat_template"):
        config["chat_template"] = template
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def build_tokenizer(metadata: Metadata) -> Tokenizer:
    """Returns the tokenizer that the file describes: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`).

    Raises:
        UnsupportedModel: Another kind of tokenizer, or an unknown pre-tokenizer.
        ModelError: A part of it is missing.
    """
    kind = metadata("tokenizer.ggml.model")
    if not kind:
        raise ModelError("the GGUF file has no tokenizer (no tokenizer.ggml.model)")
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level(metadata)
    elif kind == "llama":
        tokenizer, adds_bos = _sentence_piece(metadata), True
    else:
        raise UnsupportedModel(
            f"unsupported GGUF tokenizer {kind}; supported: gpt2 (byte-level BPE), llama (SentencePiece)"
        )
    _add_special_tokens(tokenizer, metadata)
    explicit = metadata("tokenizer.ggml.add_bos_token")
    if adds_bos if explicit is None else explicit:
        _prepend_bos(tokenizer, metadata)
    return tokenizer


def _required(metadata: Metadata, key: str) -> Any:
    value = metadata(f"tokenizer.ggml.{key}")
    if value is None:
        raise ModelError(f"the GGUF file's tokenizer is incomplete: no tokenizer.ggml.{key}")
    return value


def _byte_level(metadata: Metadata) -> tuple[Tokenizer, bool]:
    """Returns the tokenizer, and whether it puts the bos token first unless the file says otherwise."""
    name = metadata("tokenizer.ggml.pre") or "default"
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"unsupported GGUF pre-tokenizer {name} (tokenizer.ggml.pre); known are all byte-level ones of "
            "llama.cpp. A directory or Hub id with a tokenizer.json works for every supported architecture"
        )
    chosen = PRE_TOKENIZERS[name]
    vocabulary = {token: id for id, token in enumerate(_required(metadata, "tokens"))}
    merges = [tuple(merge.split(" ")) for merge in _required(metadata, "merges")]
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=chosen.whole_words))
    tokenizer.pre_tokenizer = chosen.make()
    tokenizer.decoder = decoders.ByteLevel()
    if chosen.normalizer is not None:
        tokenizer.normalizer = chosen.normalizer()
    return tokenizer, chosen.adds_bos


def _sentence_piece(metadata: Metadata) -> Tokenizer:
    tokens = _required(metadata, "tokens")
    unknown = metadata("tokenizer.ggml.unknown_token_id")
    vocabulary = {token: id for id, token in enumerate(tokens)}
    merges = _merges_by_score(vocabulary, _required(metadata, "scores"))
    unk_token = None if unknown is None else tokens[unknown]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", _SPACE)
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata("tokenizer.ggml.add_space_prefix") is False:
        tokenizer.normalizer = spaces
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def _merges_by_score(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Returns the merges that SentencePiece leaves implicit: every token cut in two, best token first."""
    ranked = []
    for token, id in vocabulary.items():
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [
            (vocabulary[left], vocabulary[right])
            for left, right in splits
            if {left, right} <= vocabulary.keys()
        ]
        ranked += [(-scores[id], left, right) for left, right in sorted(known)]
    tokens = list(vocabulary)
    return [(tokens[left], tokens[right]) for _, left, right in sorted(ranked, key=lambda merge: merge[0])]


def _add_special_tokens(tokenizer: Tokenizer, metadata: Metadata) -> None:
    tokens = _required(metadata, "tokens")
    types = metadata("tokenizer.ggml.token_type") or []
    chosen = [
        (token, kind) for token, kind in zip(tokens, types, strict=False) if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=kind == CONTROL) for token, kind in chosen]
    )


def _prepend_bos(tokenizer: Tokenizer, metadata: Metadata) -> None:
    id = metadata("tokenizer.ggml.bos_token_id")
    bos = _required(metadata, "tokens")[id]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, id)]
    )
