"""The text part of models that see, against the whole model in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    LlamaConfig,
    LlavaConfig,
    Mistral3Config,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)

from tests.models.test_model_families import BASE, MODELS, build, text

TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TOWER: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 48,
}
SECTIONS: dict[str, Any] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
WIDE_SECTIONS = SECTIONS | {"mrope_section": [2, 3, 3], "mrope_interleaved": True}

WHOLE: dict[str, PreTrainedConfig] = {
    "gemma3": Gemma3Config(text_config=MODELS["gemma3-window"].to_dict(), vision_config=TOWER),
    "mistral3": Mistral3Config(
        text_config=MistralConfig(**BASE, head_dim=16, sliding_window=None),
        vision_config=PixtralVisionConfig(**TOWER),
    ),
    "llava": LlavaConfig(text_config=LlamaConfig(**BASE), vision_config=CLIPVisionConfig(**TOWER)),
    "qwen2-vl": Qwen2VLConfig(
        text_config=BASE | {"rope_parameters": SECTIONS},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 1},
    ),
    "qwen2.5-vl": Qwen2_5_VLConfig(
        text_config=BASE | {"rope_parameters": SECTIONS}, vision_config=QWEN_TOWER
    ),
    "qwen3-vl": Qwen3VLConfig(
        text_config=BASE | {"head_dim": 16, "rope_parameters": WIDE_SECTIONS},
        vision_config=QWEN_TOWER | {"deepstack_visual_indexes": [0]},
    ),
}


@torch.inference_mode()
@pytest.mark.parametrize("name", WHOLE)
def test_text_has_the_logits_of_the_whole_model(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(WHOLE[name], attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path)
    runner, ids = build(tmp_path, 64, text_only=True).runner, text(50, 0)
    logits = runner.run([runner.kv.add_sequence()], [ids], [0], [len(ids)])
    expected = model(input_ids=torch.tensor([ids])).logits[0]
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
