"""The forward pass over the flattened tokens of a batch: embedding, the layers of the family, head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from curkv.kernels.dispatch import Kernels
from curkv.kernels.linear.formats import FLOAT32, WeightFormat
from curkv.models.blocks import CacheAttention, Embedding, Head, Layer, LayerWeights, Packer
from curkv.models.config import ModelConfig
from curkv.models.families import family_of
from curkv.models.shards import shard_of


class Batch(Protocol):
    """What the forward reads of a batch of T tokens; the attention reads the rest.

    Attributes:
        token_ids: int64 [T], the sequences' new tokens one after another.
        logit_rows: int64 [R], the tokens whose logits are wanted.
    """

    @property
    def token_ids(self) -> Tensor: ...  # noqa: D102

    @property
    def logit_rows(self) -> Tensor: ...  # noqa: D102


class Weights(Protocol):
    """A model's weights, such as a `Checkpoint`.

    Attributes:
        embedding: [vocab, hidden].
        final_norm: [hidden].
        head: [vocab, hidden].
    """

    @property
    def embedding(self) -> Tensor: ...  # noqa: D102

    @property
    def final_norm(self) -> Tensor: ...  # noqa: D102

    @property
    def head(self) -> Tensor: ...  # noqa: D102

    def layer(self, index: int) -> LayerWeights:
        """The weights of a decoder layer."""

    def attention_output(self, index: int) -> Tensor:
        """[hidden, q_size], the weight of a layer's output projection."""


def blocks(config: ModelConfig, weights: Weights, pack: Packer) -> Iterator[Any]:
    """Makes the head, the embedding and the layers, one after the other.

    The head comes first, while little else is held beside it. An embedding that is a multiple of it is read
    from the same memory. One of several processes makes layers of its shard.
    """
    family, shard = family_of(config), shard_of(config, pack.ranks)
    head = family.head_block(config, weights.final_norm, weights.head, pack)
    yield head
    factor = family.embedding_of_head(config)
    if factor is None:
        yield Embedding(pack.linear("embedding", weights.embedding))
    else:
        yield Embedding(head.projection, factor)
    del head
    for index in range(config.num_layers):
        yield family.layer_blocks(shard, index, weights.layer(index), pack)


class Decoder:
    """A decoder of any family.

    Attributes:
        config: its shape.
        weights: names of the formats of the layers' weights.
        weights_bytes: memory of its weights by kind: embedding, attention, mlp, norm, head.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        kernels: Kernels,
        form: WeightFormat = FLOAT32,
        pack: Packer | None = None,
    ):
        """Reads the weights; those of linear layers are stored in the format, or by `pack`."""
        pack = pack or Packer(kernels, form)
        self.config = config
        self._num_heads = shard_of(config, pack.ranks).num_heads
        self._weights = weights
        self._gather_rows = kernels.gather_rows
        made = blocks(config, weights, pack)
        self._head: Head = next(made)
        self._embedding: Embedding = next(made)
        self._layers: list[Layer] = list(made)
        self.weights = ", ".join(pack.formats)
        self.weights_bytes: Counter[str] = pack.nbytes

    @property
    def sinks(self) -> tuple[Tensor, ...]:
        """Of each layer's query heads, [query heads]; empty: there are none."""
        found = [layer.attention.sinks for layer in self._layers]
        return tuple(sinks for sinks in found if sinks is not None)

    @torch.no_grad()
    def forward(self, batch: Batch, cache: CacheAttention) -> Tensor:
        """Runs the batch's new tokens through the model.

        Args:
            batch: The T new tokens and the R rows whose logits are wanted.
            cache: Stores the new keys and values, and attends over everything stored.

        Returns:
            float32 [R, vocab_size], logits of `batch.logit_rows`.
        """
        return self._logits(*self._through_layers(batch, cache), batch.logit_rows)

    @torch.no_grad()
    def forward_with_states(self, batch: Batch, cache: CacheAttention) -> tuple[Tensor, Tensor]:
        """Runs the batch's new tokens through the model; tells what the head reads of each besides.

        Args:
            batch: The T new tokens and the R rows whose logits are wanted.
            cache: Stores the new keys and values, and attends over everything stored.

        Returns:
            float32 [R, vocab_size], logits of `batch.logit_rows`, and float32 [T, hidden], the last hidden
            states, normalised as the head wants them.
        """
        x, residual = self._through_layers(batch, cache)
        return self._logits(x, residual, batch.logit_rows), self._head.states(x, residual)

    def _through_layers(self, batch: Batch, cache: CacheAttention) -> tuple[Tensor, Tensor | None]:
        """Two tensors [T, hidden] whose sum is the residual stream behind the last layer."""
        x = self._embedding(batch.token_ids)
        residual: Tensor | None = None
        for layer in self._layers:
            x, residual = layer.attention(x, residual, cache, batch)
            x, residual = layer.feed(x, residual)
        return x, residual

    def _logits(self, x: Tensor, residual: Tensor | None, rows: Tensor) -> Tensor:
        x = self._gather_rows(x, rows)
        return self._head(x, None if residual is None else self._gather_rows(residual, rows))

    def output_projection(self, index: int) -> Tensor:
        """W_o of a layer, by query head that this process has: [query heads, head_dim, hidden]."""
        weight = self._layers[index].attention.output_weight
        if weight is None:
            weight = self._weights.attention_output(index)
        return weight.T.reshape(self._num_heads, self.config.padded_head_dim, -1)
