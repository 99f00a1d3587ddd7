"""What one of several processes has of a model: its heads, and its share of each MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from curkv.models.config import ModelConfig
from curkv.models.errors import UnsupportedModel
from curkv.ranks import Ranks


def shard_of(config: ModelConfig, ranks: Ranks) -> ModelConfig:
    """Returns the shape of what a process runs of each layer; embedding, norms and head it has as a whole.

    Query heads stay with their KV head.

    Raises:
        UnsupportedModel: The model cannot be divided among so many.
    """
    if ranks.size == 1:
        return config
    if config.mixture is not None:
        raise UnsupportedModel("--tensor-parallel: models with experts are not divided")
    if config.qk_norm_whole:
        raise UnsupportedModel("--tensor-parallel: norms over the queries of all heads are not divided")
    for what, count in (("KV heads", config.num_kv_heads), ("channels of the MLP", config.intermediate_size)):
        if count % ranks.size:
            raise UnsupportedModel(
                f"--tensor-parallel {ranks.size} does not divide the model's {count} {what}"
            )
    return replace(
        config,
        num_heads=config.num_heads // ranks.size,
        num_kv_heads=config.num_kv_heads // ranks.size,
        intermediate_size=config.intermediate_size // ranks.size,
    )


def shard(tensor: Tensor, shape: Sequence[int], parts: Sequence[int], ranks: Ranks) -> Tensor:
    """Returns a process's share of a tensor, which is read, if it is mapped, no further.

    Args:
        tensor: The whole.
        shape: Of the share: smaller in the dimension that is divided, if one is.
        parts: Of the share, rows of each of those that the tensor is fused of; none: it is one.
        ranks: The processes.
    """
    if parts and tensor.shape[0] != shape[0]:
        whole = torch.split(tensor, [size * ranks.size for size in parts])
        return torch.cat([ranks.own(part, 0) for part in whole])
    for dim, size in enumerate(shape):
        if tensor.shape[dim] != size:
            return ranks.own(tensor, dim).contiguous()
    return tensor
