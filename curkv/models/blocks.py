"""What decoder layers are made of: weights as they are read, and blocks that run them over kernels.

A block takes what the one before it computed and the residual stream to which that is still to be added, and
returns the same pair: the addition happens where the sum is normalised next, in one pass over the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from curkv.kernels.dispatch import Kernels
from curkv.kernels.linear.formats import FLOAT32, WeightFormat
from curkv.kernels.linear.spec import Linear
from curkv.models.config import ModelConfig
from curkv.ranks import ALONE, Ranks


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Weights of an attention block, [out, in] like torch's Linear.

    Attributes:
        norm: [hidden], of what goes in, or None: that goes in as it is.
        qkv: [q_size + 2 kv_size, hidden]: query, key and value projections, one below the other.
        o: [hidden, q_size].
        qkv_bias: [q_size + 2 kv_size] or None.
        o_bias: [hidden] or None.
        q_norm: [head_dim], of each head's query, [q_size], of those of all heads together, or None.
        k_norm: [head_dim] or [kv_size], of keys, or None.
        post_norm: [hidden], of what comes out, or None.
        sinks: [query heads], the score of one more token of each head, whose value is 0, or None.
    """

    norm: Tensor | None
    qkv: Tensor
    o: Tensor
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    post_norm: Tensor | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """Weights of a gated MLP, [out, in] like torch's Linear.

    Attributes:
        norm: [hidden], of what goes in, or None: that goes in as it is.
        gate_up: [2 intermediate, hidden]: gate above up.
        down: [hidden, intermediate].
        gate_up_bias: [2 intermediate] or None.
        down_bias: [hidden] or None.
        post_norm: [hidden], of what comes out, or None.
    """

    norm: Tensor | None
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    post_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class MixtureWeights:
    """Weights of experts and of what chooses among them.

    Attributes:
        norm: [hidden], of what goes in, or None: that goes in as it is.
        router: [experts, hidden].
        experts: Those of each, without norms, to be gone through once: they need not all be held together.
        router_bias: [experts] or None.
        shared: Of the expert that every token runs through, or None.
        shared_gate: [1, hidden], of its gate.
        post_norm: [hidden], of what comes out, or None.
    """

    norm: Tensor | None
    router: Tensor
    experts: Iterable[MlpWeights]
    router_bias: Tensor | None = None
    shared: MlpWeights | None = None
    shared_gate: Tensor | None = None
    post_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one decoder layer."""

    attention: AttentionWeights
    feed: MlpWeights | MixtureWeights

    @property
    def mlp(self) -> MlpWeights:
        """Those of its MLP.

        Raises:
            TypeError: It has experts.
        """
        if not isinstance(self.feed, MlpWeights):
            raise TypeError("the layer has experts, not an MLP")
        return self.feed


class CacheAttention(Protocol):
    """The cache as a layer sees it."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> Tensor:
        """Applies RoPE, stores keys and values, and attends.

        Args:
            layer: Index of the layer.
            q: [T, num_heads, head_dim], before RoPE, heads contiguous; may be overwritten.
            k: [T, num_kv_heads, head_dim], before RoPE, heads contiguous.
            v: [T, num_kv_heads, head_dim], heads contiguous.
            batch: What the T tokens are, as the attention was made to read it.

        Returns:
            [T, num_heads, head_dim].
        """


class Output(Protocol):
    """A projection to the residual stream; see `Linear`."""

    def __call__(self, x: Tensor) -> Tensor: ...  # noqa: D102

    def after_silu_mul(self, gate_up: Tensor) -> Tensor: ...  # noqa: D102

    @property
    def given(self) -> Tensor | None: ...  # noqa: D102


class SummedOutput:
    """A projection whose columns lie in several processes, which add up what each has computed."""

    def __init__(self, linear: Linear, ranks: Ranks):
        self._linear, self._ranks = linear, ranks

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear.__call__`."""
        return self._ranks.sum(self._linear(x))

    def after_silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Linear.after_silu_mul`."""
        return self._ranks.sum(self._linear.after_silu_mul(gate_up))

    @property
    def given(self) -> Tensor | None:
        """See `Linear.given`: this process's columns."""
        return self._linear.given


NOT_OF_LAYERS = ("embedding", "head")
"""Kinds of weights that have a format of their own."""


class Packer:
    """Makes of weights what runs, and counts their memory.

    Attributes:
        kernels: What they run on.
        form: Of the weights of linear layers.
        ranks: The processes that share the layers.
        nbytes: Memory by kind: embedding, attention, mlp, norm, head.
        formats: Names of the formats that weights of layers were stored in, the most common one first.
    """

    def __init__(self, kernels: Kernels, form: WeightFormat = FLOAT32, ranks: Ranks = ALONE):
        self.kernels = kernels
        self.form = form
        self.ranks = ranks
        self.nbytes: Counter[str] = Counter()
        self._stored: Counter[str] = Counter()

    @property
    def formats(self) -> list[str]:
        """Names of the formats of the layers' weights, that of most of them first."""
        return [name for name, _ in self._stored.most_common()]

    def linear(self, kind: str, weight: Tensor, bias: Tensor | None = None, exact: bool = False) -> Linear:
        """Packs the weight of a linear layer, [N, K], and its bias, [N]; neither is needed afterwards.

        One that is to be `exact` is not rounded.
        """
        form = self.form_of(kind, weight, exact)
        return self.noted(kind, self.kernels.pack_linear(weight, bias, form), form)

    def output(self, kind: str, weight: Tensor, bias: Tensor | None = None) -> Output:
        """Packs the weight of a projection to the residual stream, of which this process has some columns.

        Its products are added up over the processes; the bias is added by one of them.
        """
        linear = self.linear(kind, weight, bias if self.ranks.rank == 0 else None)
        return linear if self.ranks.size == 1 else SummedOutput(linear, self.ranks)

    def form_of(self, kind: str, weight: Tensor, exact: bool = False) -> WeightFormat:
        """Returns the format in which a weight is stored."""
        form = self.form.of_head if kind in NOT_OF_LAYERS else self.form
        if exact and form.rounds:
            return FLOAT32
        return form.of(weight)

    def keep(self, kind: str, weight: Tensor) -> Tensor:
        """Takes a tensor as it is."""
        self.nbytes[kind] += weight.nbytes
        return weight

    def noted(self, kind: str, linear: Linear, form: WeightFormat) -> Linear:
        """Counts a linear layer, and returns it."""
        self.nbytes[kind] += linear.nbytes
        if kind not in NOT_OF_LAYERS:
            self._stored[form.name] += linear.nbytes
        return linear


class Embedding:
    """From token ids to the residual stream."""

    def __init__(self, weight: Linear, factor: float = 1.0):
        """Takes the weight, which may be the head's, and what its rows are multiplied with."""
        self._weight, self._factor = weight, factor

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Returns [T, hidden] for int64 [T]."""
        return self._weight.rows(token_ids, self._factor)


class Entry:
    """The way from the residual stream into a block: sum, norm if there is one, first linear layer."""

    def __init__(
        self, kind: str, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float, pack: Packer
    ):
        self._linear, self._eps, self._normed = pack.linear(kind, weight, bias), eps, norm is not None
        ones = torch.ones(weight.shape[1], dtype=weight.dtype, device=weight.device)
        self._norm = ones if norm is None else pack.keep("norm", norm)
        self._rms_norm = pack.kernels.rms_norm

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the product, [T, N], and the sum of x and the residual, [T, hidden]."""
        if self._normed:
            return self._linear.after_rms_norm(x, self._norm, self._eps, residual)
        if residual is not None:
            _, x = self._rms_norm(x, self._norm, self._eps, residual)  # for its sum, which can be recorded
        return self._linear(x), x


class Exit:
    """The norm of what a block adds to the residual stream, if there is one."""

    def __init__(self, norm: Tensor | None, eps: float, pack: Packer):
        self._norm = None if norm is None else pack.keep("norm", norm)
        self._eps, self._rms_norm = eps, pack.kernels.rms_norm

    def __call__(self, out: Tensor) -> Tensor:
        """[T, hidden] from [T, hidden]."""
        return out if self._norm is None else self._rms_norm(out, self._norm, self._eps)


class Attention:
    """Self-attention: norm, fused projections, norms of heads, the cache, output projection, norm.

    Attributes:
        sinks: [query heads], see `AttentionWeights`; the cache is told of them beforehand.
    """

    def __init__(self, config: ModelConfig, layer: int, weights: AttentionWeights, pack: Packer):
        eps = config.rms_norm_eps
        self._layer, self._head_dim, self._eps = layer, config.padded_head_dim, eps
        self._heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self._rms_norm = pack.kernels.rms_norm
        self._qkv = Entry("attention", weights.qkv, weights.qkv_bias, weights.norm, eps, pack)
        self._head_norms: tuple[Tensor, Tensor] | None = None
        if weights.q_norm is not None and weights.k_norm is not None:
            self._head_norms = pack.keep("norm", weights.q_norm), pack.keep("norm", weights.k_norm)
        self._o = pack.output("attention", weights.o, weights.o_bias)
        self.sinks = None if weights.sinks is None else pack.keep("attention", weights.sinks)
        self._exit = Exit(weights.post_norm, eps, pack)

    @property
    def output_weight(self) -> Tensor | None:
        """[hidden, q_size], the weight of the output projection, if it is held as it was given."""
        return self._o.given

    def __call__(
        self, x: Tensor, residual: Tensor | None, cache: CacheAttention, batch: Any
    ) -> tuple[Tensor, Tensor]:
        """Runs the block.

        Args:
            x: [T, hidden].
            residual: [T, hidden], to which x is still to be added; None in front of the first block.
            cache: Stores the new keys and values, and attends over everything stored.
            batch: Handed to `cache`.

        Returns:
            [T, hidden], to be added to the other: the sum of x and the residual.
        """
        qkv, residual = self._qkv(x, residual)
        q, k, v = torch.split(qkv.view(len(qkv), -1, self._head_dim), self._heads, dim=1)
        if self._head_norms is not None:
            q, k = (self._normed(q, self._head_norms[0]), self._normed(k, self._head_norms[1]))
        return self._exit(self._o(cache.attend(self._layer, q, k, v, batch).flatten(1))), residual

    def _normed(self, heads: Tensor, norm: Tensor) -> Tensor:
        """Normalises [T, heads, head_dim] in groups as wide as the norm: one head, or all of a token."""
        return self._rms_norm(heads.view(len(heads), -1, len(norm)), norm, self._eps).view(heads.shape)


Gate = Callable[[Tensor], Tensor]
"""The activation of an MLP: [T, I] from gate beside up, [T, 2 I]."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "relu": F.relu,
}
"""Activations of a gate that torch computes, so that decode steps over them are not recorded."""
APPROXIMATE_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
"""Names of the activation that `gelu_mul` computes."""


def gate(config: ModelConfig, kernels: Kernels) -> Gate | None:
    """Returns the activation of gate beside up, [T, 2 I]; None: `silu_mul`, which a product takes along."""
    if config.activation in APPROXIMATE_GELU:
        return kernels.gelu_mul
    activation = ACTIVATIONS.get(config.activation)
    return None if activation is None else partial(_gated, activation)


def _gated(activation: Callable[[Tensor], Tensor], gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up


class Gated:
    """What is between the norms of a gated MLP: gate and up projections, activation, down projection."""

    def __init__(self, config: ModelConfig, weights: MlpWeights, pack: Packer):
        self.gate_up = pack.linear("mlp", weights.gate_up, weights.gate_up_bias)
        self.down = Down(config, weights, pack)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden] from [T, hidden]."""
        return self.down(self.gate_up(x))


class Down:
    """The activation of an MLP's gate, its product with the other half, and the down projection."""

    def __init__(self, config: ModelConfig, weights: MlpWeights, pack: Packer):
        self._gate = gate(config, pack.kernels)
        self._linear = pack.output("mlp", weights.down, weights.down_bias)

    def __call__(self, gate_up: Tensor) -> Tensor:
        """[T, hidden] from gate beside up, [T, 2 intermediate]."""
        if self._gate is None:
            return self._linear.after_silu_mul(gate_up)
        return self._linear(self._gate(gate_up))


class Mlp:
    """The gated MLP: norm, gate and up projections, activation, down projection, norm."""

    def __init__(self, config: ModelConfig, weights: MlpWeights, pack: Packer):
        eps = config.rms_norm_eps
        self._gate_up = Entry("mlp", weights.gate_up, weights.gate_up_bias, weights.norm, eps, pack)
        self._down = Down(config, weights, pack)
        self._exit = Exit(weights.post_norm, eps, pack)

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Runs the block; see `Attention.__call__`."""
        gate_up, residual = self.gate_up(x, residual)
        return self._exit(self._down(gate_up)), residual

    def gate_up(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns gate beside up, [T, 2 intermediate], and the sum of x and the residual."""
        return self._gate_up(x, residual)


class Head:
    """From the last layer to logits: final norm, projection to the vocabulary, cap.

    Attributes:
        projection: The linear layer.
    """

    def __init__(self, config: ModelConfig, norm: Tensor, weight: Tensor, pack: Packer):
        self._eps, self._softcap = config.rms_norm_eps, config.logit_softcap
        self._norm = pack.keep("norm", norm)
        self.projection = pack.linear("head", weight)
        self._rms_norm = pack.kernels.rms_norm

    def states(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Returns float32 [T, hidden], the norm of the sum of x and of the residual, [T, hidden]."""
        if residual is None:
            return self._rms_norm(x, self._norm, self._eps).float()
        return self._rms_norm(x, self._norm, self._eps, residual)[0].float()

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Returns float32 [R, vocab_size] for the sums of R rows of x and of the residual, [R, hidden]."""
        logits, _ = self.projection.after_rms_norm(x, self._norm, self._eps, residual)
        logits = logits.float()
        return logits if self._softcap is None else self._softcap * (logits / self._softcap).tanh()


class Feed(Protocol):
    """What follows the attention in a layer."""

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Runs the block; see `Attention.__call__`."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer ready to run."""

    attention: Attention
    feed: Feed
