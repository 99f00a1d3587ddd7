import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from curkv.models.errors import UnsupportedModel
from curkv.models.pruning.plan import PruningError, kept_rows
from curkv.models.pruning.source import Source
from tests.pruning.conftest import save_model


@pytest.mark.parametrize(
    ("width", "ratio", "align", "kept"),
    [
        (1536, 0.25, None, 1152),
        (1536, 0.20, None, 1216),
        (1536, 0.20, 128, 1280),
        (14336, 0.25, None, 10752),
        (11008, 0.30, None, 7680),
        (100, 0.9, 1, 10),
    ],
)
def test_kept_rows_are_the_nearest_multiple(width: int, ratio: float, align: int | None, kept: int) -> None:
    assert kept_rows(width, ratio, align) == kept


@pytest.mark.parametrize("ratio", [0.0, -0.1, 0.91, 1.0, float("nan"), float("inf")])
def test_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(PruningError, match="outside"):
        kept_rows(1536, ratio)


@pytest.mark.parametrize(("ratio", "left"), [(0.01, "all"), (0.9, "none")])
def test_rounding_to_all_or_no_rows_is_refused(ratio: float, left: str) -> None:
    with pytest.raises(PruningError, match=left):
        kept_rows(256, ratio, 128)


def test_fused_mlp_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"model.layers.0.mlp.gate_up_proj.weight": torch.zeros(4, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Phi3ForCausalLM"]}))
    with pytest.raises(UnsupportedModel, match="gate_up_proj"):
        Source(tmp_path)


def test_unsupported_architecture_is_refused_by_name(tmp_path: Path) -> None:
    save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    with pytest.raises(UnsupportedModel, match="MambaForCausalLM"):
        Source(tmp_path)
