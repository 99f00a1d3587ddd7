import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from curkv.models.pruning.distil import trained_tensors
from curkv.models.pruning.prune import PruneOptions, prune
from curkv.models.pruning.self_text import TEXT_FILE, Writing, load_text
from curkv.models.pruning.source import Source
from tests.pruning.conftest import FAMILIES, ignore_progress, save_model


def pruned(base: Source, output: Path, steps: int) -> Path:
    settings = {"writing": Writing(sequences=12, tokens=24), "distil_steps": steps}
    prune(base, "base", output, PruneOptions("self-calibrated", 0.5, 0, 1, settings), ignore_progress)
    return output


def divergence(base: Source, other: Path, text: torch.Tensor) -> float:
    """KL of the next tokens' distributions in transformers, in nats."""
    wanted, found = (
        AutoModelForCausalLM.from_pretrained(directory)(text).logits.log_softmax(-1).flatten(0, 1)
        for directory in (base.directory, other)
    )
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_distilling_brings_the_predictions_closer_to_the_dense_models(tmp_path: Path, family: str) -> None:
    base = Source(save_model(tmp_path / "base", family))
    without, with_steps = pruned(base, tmp_path / "without", 0), pruned(base, tmp_path / "with", 40)
    text = load_text(with_steps / TEXT_FILE, 97)
    assert divergence(base, with_steps, text) < 0.9 * divergence(base, without, text)
    provenance = Source(with_steps).provenance
    assert provenance is not None and provenance["details"]["distil_steps"] == 40
    losses = provenance["details"]["losses"]
    assert len(losses) == 40 and losses[-1] < losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_tensors_are_named_as_in_the_checkpoint(tmp_path: Path, family: str) -> None:
    source = Source(save_model(tmp_path, family))
    for name, tensor in trained_tensors(source.checkpoint.layer(1), source.config).items():
        assert torch.equal(tensor, source.tensor(f"model.layers.1.{name}"))


def test_the_rows_are_those_chosen_without_distilling(base: Source, tmp_path: Path) -> None:
    rows = [
        json.loads((pruned(base, tmp_path / str(steps), steps) / "pruning.json").read_text())["kept_rows"]
        for steps in (0, 2)
    ]
    assert rows[0] == rows[1]
