"""Linear layers in torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from curkv.kernels.linear.formats import FLOAT32, WeightFormat
from curkv.kernels.linear.spec import Linear, Packed
from curkv.kernels.rms_norm.reference import rms_norm
from curkv.kernels.silu_mul.reference import silu_mul


class ComposedLinear(ABC):
    """A linear layer that runs what goes before on its own.

    Attributes:
        given: [N, K], the weight as it was given, if it is held so.
        packed: The weight as it lies in memory, if the layer can be made of that again.
        rms_norm, silu_mul: What may go before.
    """

    given: Tensor | None = None
    packed: Packed | None = None
    rms_norm: Callable[..., Any]
    silu_mul: Callable[[Tensor], Tensor]

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x W^T + b, [T, N] from [T, K]."""

    def after_rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The product with normalised rows, see `rms_norm`.

        Args:
            x: [T, K].
            weight: [K], of the norm.
            eps: Of the norm.
            residual: [T, K], added to x first.

        Returns:
            [T, N], and the sum x + residual, [T, K]; without a residual x itself.
        """
        if residual is None:
            return self(self.rms_norm(x, weight, eps)), x
        normed, total = self.rms_norm(x, weight, eps, residual)
        return self(normed), total

    def rows(self, ids: Tensor, factor: float = 1.0) -> Tensor:
        """Rows of the weight times a factor, [T, K], for int64 [T]: what an embedding reads."""
        raise NotImplementedError("no embedding is stored like this")

    def after_silu_mul(self, gate_up: Tensor) -> Tensor:
        """The product with silu(gate) * up, see `silu_mul`: [T, N] from [T, 2 K]."""
        return self(self.silu_mul(gate_up))


@dataclass(frozen=True, eq=False)
class ReferenceLinear(ComposedLinear):
    """A linear layer.

    Attributes:
        weight: [N, K], of the type of x, or of 8 bits.
        bias: [N].
        scales: float32 [N] of a weight of 8 bits, by which its rows are multiplied.
        given: [N, K], the weight if it is held as it was given.
        product: Type of the product, if it is not that of x.
        rms_norm, silu_mul: What may go before.
    """

    weight: Tensor
    bias: Tensor | None = None
    scales: Tensor | None = None
    given: Tensor | None = None
    product: torch.dtype | None = None
    rms_norm: Callable[..., Any] = rms_norm
    silu_mul: Callable[[Tensor], Tensor] = silu_mul

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        return sum(part.nbytes for part in (self.weight, self.bias, self.scales) if part is not None)

    def rows(self, ids: Tensor, factor: float = 1.0) -> Tensor:
        """See `ComposedLinear.rows`."""
        found = self.weight[ids]
        if self.scales is not None:
            found = found.to(self.scales.dtype) * self.scales[ids][:, None]
        return found if factor == 1 else found * factor

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T + b, [T, N] from [T, K]."""
        if self.scales is None:
            if self.product not in (None, x.dtype):
                return _widened(x, self.weight, self.bias)
            return linear(x, self.weight, self.bias)
        out = linear(x, self.weight.to(x.dtype)) * self.scales.to(x.dtype)
        return out if self.bias is None else out + self.bias


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in float32, of which nothing is rounded."""
    if x.is_cuda and not torch.version.hip:
        out = torch.mm(x, weight.t(), out_dtype=torch.float32)
    else:
        out = x.float() @ weight.t().float()
    return out if bias is None else out + bias


def pack_linear(
    weight: Tensor | Packed, bias: Tensor | None = None, form: WeightFormat = FLOAT32
) -> ReferenceLinear:
    """Makes a linear layer whose weight is stored in a format; bias and x are not rounded.

    Args:
        weight: [N, K].
        bias: [N].
        form: The weight's format.

    Returns:
        A function from x [T, K] to x W^T + b, [T, N], see `ReferenceLinear`.
    """
    assert not isinstance(weight, Packed), "nothing is packed here"
    stored, scales = form.encode(weight)
    given = stored if stored is weight else None
    return ReferenceLinear(stored, bias, scales, given, form.product)


class GroupedLinear:
    """Linear layers of one shape, each of which multiplies the rows of its group, one after the other."""

    def __init__(self, layers: Sequence[Linear]):
        self._layers = layers

    def __call__(self, x: Tensor, groups: Tensor) -> Tensor:
        """Returns the products, [T, N].

        Args:
            x: [T, K].
            groups: int64 [G, 3]: a layer, where its rows begin, and how many they are, in their order; zeros
                where there is none.
        """
        return self._each(groups, lambda layer, rows: layer(x[rows]))

    def after_silu_mul(self, gate_up: Tensor, groups: Tensor) -> Tensor:
        """The products with silu(gate) * up, see `silu_mul`: [T, N] from [T, 2 K]."""
        return self._each(groups, lambda layer, rows: layer.after_silu_mul(gate_up[rows]))

    def _each(self, groups: Tensor, run: Callable[[Linear, slice], Tensor]) -> Tensor:
        found = [entry for entry in groups.tolist() if entry[2]]
        return torch.cat(
            [run(self._layers[layer], slice(first, first + size)) for layer, first, size in found]
        )


def group_linear(layers: Sequence[Linear]) -> GroupedLinear:
    """Has linear layers of one shape run as one, see `GroupedLinear`."""
    return GroupedLinear(layers)
