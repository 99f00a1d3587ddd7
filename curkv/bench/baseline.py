"""transformers' `generate` in float32: what servers are compared with, and the tokens that are right."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curkv.bench.measurement import Measurement
from curkv.bench.workload import Workload, prompts
from curkv.models.loading.checkpoint import tensor_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel


def load(directory: Path) -> PreTrainedModel:
    """Reads a model as transformers would run it, in float32, from a GGUF file too."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    files = tensor_files(directory)
    config = AutoConfig.from_pretrained(directory)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    wrong = model.load_state_dict({name: files.read(name).float() for name in files.names}, strict=False)
    model.tie_weights()
    assert set(wrong.missing_keys) <= set(model.all_tied_weights_keys), wrong
    model.generation_config = GenerationConfig.from_pretrained(directory)
    model.eval()  # type: ignore[no-untyped-call]
    return model


@torch.inference_mode()
def generate(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> Tensor:
    """Greedy tokens that follow prompts of one length, the end of the text ignored.

    Args:
        model: of transformers.
        ids: int64 [prompts, tokens].
        new_tokens: of each.

    Returns:
        int64 [prompts, new_tokens].
    """
    found: Tensor = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return found[:, ids.shape[1] :]


def measure(model: PreTrainedModel, workload: Workload, tokenizer: Tokenizer, seed: int) -> Measurement:
    """Runs a workload's prompts as one batch; a step is the time between the first token and the last."""
    ids = torch.tensor(prompts(tokenizer, workload, seed))
    seconds = {}
    for new_tokens in (1, workload.new_tokens):
        started = time.perf_counter()
        generate(model, ids, new_tokens)
        seconds[new_tokens] = time.perf_counter() - started
    prefill = seconds[1]
    step = (seconds[workload.new_tokens] - prefill) / (workload.new_tokens - 1)
    return Measurement(
        contender="transformers",
        workload=workload,
        ttft=prefill,
        itl_p50=step,
        itl_p99=step,
        prefill_rate=ids.numel() / prefill,
        decode_rate=workload.requests / step,
    )
