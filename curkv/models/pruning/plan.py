"""How many rows of each MLP are kept, and from which models."""

from __future__ import annotations

from collections.abc import Collection

from curkv.models.errors import ModelError, UnsupportedModel

MAX_RATIO = 0.9
LARGE_MLP = 4096
"""From this width on, rows are kept in multiples of 128 (GPU tiles) rather than 64."""
FUSED = ("gate_up_proj", "w12", "dense_h_to_4h")
"""Names under which other families (Phi-3, GLM) keep gate and up together."""


class PruningError(ModelError):
    """A model cannot be pruned as asked; the message says why."""


def kept_rows(intermediate_size: int, ratio: float, align: int | None = None) -> int:
    """Returns how many rows of an MLP stay when `ratio` of them should go.

    Args:
        intermediate_size: Width of the MLP.
        ratio: Share to remove, in (0, 0.9].
        align: The result is a multiple of this, the nearest one; None takes 128, or 64 for MLPs under 4,096.

    Raises:
        PruningError: The ratio is outside its range, or rounds to none or to all rows.
    """
    if not 0 < ratio <= MAX_RATIO:
        raise PruningError(
            f"ratio {ratio:g} is outside (0, {MAX_RATIO:g}]: it is the share of rows to remove"
        )
    unit = align or (128 if intermediate_size >= LARGE_MLP else 64)
    kept = round(intermediate_size * (1 - ratio) / unit) * unit
    if not 0 < kept < intermediate_size:
        raise PruningError(
            f"removing {ratio:.0%} of {intermediate_size} rows in multiples of {unit} leaves "
            f"{'all' if kept else 'none'} of them; choose another ratio or a smaller --align"
        )
    return kept


def check_gated(tensors: Collection[str]) -> None:
    """Raises UnsupportedModel if the MLPs do not keep gate_proj, up_proj and down_proj apart."""
    fused = next((name for name in FUSED if any(f".{name}.weight" in tensor for tensor in tensors)), None)
    if fused:
        raise UnsupportedModel(
            f"fused MLPs ({fused}) are not supported; pruning needs gate_proj, up_proj and down_proj apart"
        )
    if "model.layers.0.mlp.gate_proj.weight" not in tensors:
        raise UnsupportedModel("layer 0 has no mlp.gate_proj; pruning needs a gated MLP in every layer")
