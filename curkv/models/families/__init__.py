"""The families of models that can be served: one file each, registered here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curkv.models.config import ModelConfig, unsupported
from curkv.models.families.base import Family, PreTokenizer
from curkv.models.families.cohere2 import Cohere2
from curkv.models.families.exaone4 import Exaone4
from curkv.models.families.gemma import Gemma, Gemma3
from curkv.models.families.glm4 import Glm, Glm4
from curkv.models.families.granite import Granite
from curkv.models.families.llama import Llama
from curkv.models.families.mistral import Mistral
from curkv.models.families.olmo2 import Olmo2, Olmo3
from curkv.models.families.phi3 import Phi3
from curkv.models.families.qwen2 import Qwen2
from curkv.models.families.qwen3 import Qwen3
from curkv.models.families.smollm3 import SmolLM3

FAMILIES: tuple[Family, ...] = (
    Llama(),
    Mistral(),
    Qwen2(),
    Qwen3(),
    Granite(),
    Olmo2(),
    Olmo3(),
    SmolLM3(),
    Phi3(),
    Glm(),
    Glm4(),
    Exaone4(),
    Cohere2(),
    Gemma(),
    Gemma3(),
)

UNSUPPORTED = {
    "vision or audio towers": ("vision_config", "audio_config"),
    "multi-head latent attention": ("kv_lora_rank",),
    "state-space or delta-rule layers": ("mamba_", "ssm_", "state_size", "linear_", "gated_delta_"),
    "mixtures of experts": ("num_experts", "num_local_experts", "n_routed_experts"),
}
"""What no family has, and the settings, or beginnings of their names, that tell of it."""

SUPPORTED_ARCHITECTURES = tuple(family.architectures[0] for family in FAMILIES)


def family_of(config: ModelConfig) -> Family:
    """Returns the family that a configuration was read by."""
    return next(family for family in FAMILIES if family.architectures[0] == config.architecture)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a parsed `config.json`, in the form of transformers 4 or 5.

    Raises:
        UnsupportedModel: The architecture, or a setting of it, is not implemented.
    """
    names = raw.get("architectures") or []
    names = [str(name) for name in names] if isinstance(names, list) else [str(names)]
    for family in FAMILIES:
        if set(names) & set(family.architectures) or (
            not names and raw.get("model_type") == family.model_type
        ):
            return family.config(raw)
    found = ", ".join(names) or f"model_type {raw.get('model_type')!r} without architectures"
    if missing := _missing(raw):
        found += f" with {missing}"
    raise unsupported("architecture", found, SUPPORTED_ARCHITECTURES)


def _missing(raw: Mapping[str, Any]) -> str:
    """Names what an unknown architecture consists of that no family has, as far as its settings tell."""
    text = raw.get("text_config")
    keys = {*raw, *(text if isinstance(text, dict) else ())}
    return ", ".join(
        what
        for what, signs in UNSUPPORTED.items()
        if any(key == sign or (sign.endswith("_") and key.startswith(sign)) for key in keys for sign in signs)
    )


def family_of_gguf(architecture: str) -> Family:
    """Returns the family whose GGUF files name this architecture.

    Raises:
        UnsupportedModel: There is none.
    """
    known = {family.gguf_architecture: family for family in FAMILIES if family.gguf_architecture}
    if architecture not in known:
        raise unsupported("GGUF architecture", architecture, tuple(map(str, known)))
    return known[architecture]


def pre_tokenizers() -> dict[str, PreTokenizer]:
    """Returns every pre-tokenizer by its name in GGUF files."""
    return {name: made for family in FAMILIES for name, made in family.pre_tokenizers.items()}
