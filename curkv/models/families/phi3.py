"""Phi-3, Phi-3.5 and Phi-4, dense: fused projections, LongRoPE; in Phi-4-mini some channels do not rotate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

from torch import Tensor

from curkv.models.config import LayerKind, ModelConfig, read_shape, read_window
from curkv.models.families.base import Family, Read
from curkv.models.families.gguf_names import FUSED_TENSORS

DEFAULT_EPS = 1e-5
"""What transformers assumes if config.json does not say."""

OLDER_NAMES = {"su": "longrope", "yarn": "longrope"}
"""Of LongRoPE, in the first files."""


class Phi3(Family):
    """No biases."""

    title = "Phi-3, Phi-3.5, Phi-4, with windows or without"
    model_type = "phi3"
    architectures = ("Phi3ForCausalLM", "Phi3Model")
    gguf_architecture = "phi3"
    gguf_tensors = FUSED_TENSORS
    gguf_windows = True

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """See `Family.config`."""
        raw = {"rms_norm_eps": DEFAULT_EPS} | dict(raw)
        for key in ("rope_scaling", "rope_parameters"):
            if isinstance(found := raw.get(key), dict):
                kind = str(found.get("rope_type", found.get("type", "default")))
                raw[key] = found | {"rope_type": OLDER_NAMES.get(kind, kind)}
        config = read_shape(raw, self.architectures[0], partial=True)
        return replace(config, layers=(LayerKind(config.rope, read_window(raw)),) * config.num_layers)

    def qkv(self, read: Read, config: ModelConfig, name: str, *columns: int) -> list[Tensor]:
        """See `Family.qkv`."""
        sizes = [config.q_size, config.kv_size, config.kv_size]
        rows = read(name.format("qkv_proj"), sum(sizes), *columns, parts=sizes)
        return [rows[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]

    def gate_up(self, read: Read, config: ModelConfig, name: str, *columns: int) -> Tensor:
        """See `Family.gate_up`."""
        size = config.intermediate_size
        return read(name.format("gate_up_proj"), 2 * size, *columns, parts=(size, size))
