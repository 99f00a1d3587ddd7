"""The families of models that can be served: one file each, registered here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from curkv.models.config import ModelConfig, unsupported
from curkv.models.errors import UnsupportedModel
from curkv.models.families.base import Family
from curkv.models.families.cohere2 import Cohere2
from curkv.models.families.exaone4 import Exaone4
from curkv.models.families.gemma import Gemma, Gemma2, Gemma3
from curkv.models.families.glm4 import Glm, Glm4
from curkv.models.families.gpt_oss import GptOss
from curkv.models.families.granite import Granite, GraniteMoe
from curkv.models.families.llama import Llama
from curkv.models.families.mistral import Mistral
from curkv.models.families.mixtral import Mixtral
from curkv.models.families.olmo2 import Olmo2, Olmo3
from curkv.models.families.phi3 import Phi3
from curkv.models.families.qwen2 import Qwen2
from curkv.models.families.qwen3 import Qwen3
from curkv.models.families.qwen_moe import Qwen2Moe, Qwen3Moe
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
    Gemma2(),
    Gemma3(),
    Mixtral(),
    Qwen2Moe(),
    Qwen3Moe(),
    GraniteMoe(),
    GptOss(),
)

TOWERS = ("vision_config", "audio_config")
"""Settings of what a model has beside its text part."""

TEXT_TYPES = {
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""`model_type` of text parts that compute as those of a family do."""

UNSUPPORTED = {
    "vision or audio towers": TOWERS,
    "multi-head latent attention": ("kv_lora_rank",),
    "state-space or delta-rule layers": ("mamba_", "ssm_", "state_size", "linear_", "gated_delta_"),
    "mixtures of experts of another kind": ("num_experts", "num_local_experts", "n_routed_experts"),
}
"""What no family has, and the settings, or beginnings of their names, that tell of it."""

SUPPORTED_ARCHITECTURES = tuple(family.architectures[0] for family in FAMILIES)


def table() -> Iterator[str]:
    """Markdown with a row for each family, as it is in docs/models.md."""
    yield "| family | `model_type` | architecture | GGUF |"
    yield "|---|---|---|---|"
    for family in sorted(FAMILIES, key=lambda family: family.title.casefold()):
        gguf = f"`{family.gguf_architecture}`" if family.gguf_architecture else ""
        yield f"| {family.title} | `{family.model_type}` | `{family.architectures[0]}` | {gguf} |"


def family_of(config: ModelConfig) -> Family:
    """Returns the family that a configuration was read by."""
    return next(family for family in FAMILIES if family.architectures[0] == config.architecture)


def read_config(raw: Mapping[str, Any], text_only: bool = False) -> ModelConfig:
    """Reads a parsed `config.json`, in the form of transformers 4 or 5.

    Args:
        raw: What was parsed.
        text_only: Of a model that sees or hears besides, its text part is meant.

    Raises:
        UnsupportedModel: The architecture, or a setting of it, is not implemented.
    """
    if text_only and _sees_or_hears(raw):
        return read_config(text_part(raw))
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
    if _sees_or_hears(raw) and text_part(raw).get("model_type") in [family.model_type for family in FAMILIES]:
        raise UnsupportedModel(f"unsupported architecture {found}; --text-only serves its text part")
    raise unsupported("architecture", found, SUPPORTED_ARCHITECTURES)


def text_part(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration of the text part of a model that sees or hears besides.

    Positions of several dimensions are equal in all of them where there is text alone.
    """
    text = raw.get("text_config")
    outer = {key: value for key, value in raw.items() if key not in ("architectures", "text_config")}
    part = outer | (text if isinstance(text, dict) else {})
    part = {key: value for key, value in part.items() if key not in ("architectures", *TOWERS)}
    kind = str(part.get("model_type"))
    part["model_type"] = TEXT_TYPES.get(kind, kind)
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(given := part.get(key), dict) and "mrope_section" in given:
            plain = {name: value for name, value in given.items() if not name.startswith("mrope")}
            for name in ("type", "rope_type"):
                plain[name] = "default" if plain.get(name) == "mrope" else plain.get(name, "default")
            part[key] = plain
    return part


def _sees_or_hears(raw: Mapping[str, Any]) -> bool:
    return any(isinstance(raw.get(tower), dict) for tower in TOWERS)


def _missing(raw: Mapping[str, Any]) -> str:
    """Names what an unknown architecture consists of that no family has, as far as its settings tell."""
    text = raw.get("text_config")
    keys = {*raw, *(text if isinstance(text, dict) else ())}
    return ", ".join(
        what
        for what, signs in UNSUPPORTED.items()
        if any(key == sign or (sign.endswith("_") and key.startswith(sign)) for key in keys for sign in signs)
    )


def family_of_gguf(architecture: str, experts: bool = False) -> Family:
    """Returns the family whose GGUF files name this architecture, and have experts or none if that tells.

    Raises:
        UnsupportedModel: There is none.
    """
    named = [family for family in FAMILIES if family.gguf_architecture == architecture]
    if not named:
        known = dict.fromkeys(
            str(family.gguf_architecture) for family in FAMILIES if family.gguf_architecture
        )
        raise unsupported("GGUF architecture (general.architecture)", architecture, tuple(known))
    return max(named, key=lambda family: family.gguf_experts == experts)
