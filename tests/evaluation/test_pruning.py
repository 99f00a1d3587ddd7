"""A pruned model beside its base, on a model small enough to be made here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from curkv.evaluation.pruning import PruningReport, ReportOptions, measure, measure_size
from curkv.evaluation.pruning_report import write_report
from curkv.models.pruning.plan import PruningError
from curkv.models.pruning.prune import PruneOptions, prune
from curkv.models.pruning.source import Source

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPTIONS = ReportOptions(windows=2, window_tokens=64, tasks=("needle",), task_tokens=900, samples=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Source:
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return Source(directory)


@pytest.fixture(scope="module")
def pruned(base: Source) -> Source:
    directory = base.directory.with_name("pruned")
    prune(base, "base", directory, PruneOptions("magnitude", 0.25, align=8), lambda *_: None)
    return Source(directory)


@pytest.fixture(scope="module")
def report(base: Source, pruned: Source) -> PruningReport:
    return measure(base.directory, pruned.directory, OPTIONS)


def test_sizes_and_the_bound_of_the_speed(base: Source, report: PruningReport) -> None:
    mlp = 3 * 64 * 96 * 2
    others = 2 * 128 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32) + 5 * 64  # embedding, head, attention, norms
    assert (report.base_size.parameters, report.base_size.mlp) == (mlp + others, mlp)
    assert report.base_size.read == mlp + others - 128 * 64
    assert report.size.mlp == mlp * 3 // 4 and report.size.bytes < report.base_size.bytes
    assert report.speed_bound == pytest.approx(1 / (1 - 0.25 * mlp / report.base_size.read))
    assert measure_size(base) == report.base_size


def test_both_choices_are_held_against_the_base(report: PruningReport) -> None:
    assert set(report.qualities) == {"pruned", "random rows"}
    for quality in report.qualities.values():
        found = quality.text["documentation"]
        assert found.tokens == 2 * 63 and found.kl > 0 and 0 < found.top1 < 1
        assert len(quality.ks) == 2 and all(0 < distance < 1 for distance in quality.ks)
    assert report.qualities["pruned"].ks != report.qualities["random rows"].ks
    reference = {quality.text["documentation"].reference_perplexity for quality in report.qualities.values()}
    assert len(reference) == 1


def test_the_report_is_written(report: PruningReport, tmp_path: Path) -> None:
    text = write_report(report, tmp_path / "new").read_text()
    assert "magnitude, 25.0% of the MLP weights" in text
    ratio = report.qualities["random rows"].text["documentation"].ratio
    assert f"| {ratio:.2f} |" in text and f"= {report.speed_bound:.2f} is the most" in text
    assert (tmp_path / "new/pruning.png").stat().st_size > 1000


def test_models_that_do_not_belong_together_are_refused(base: Source, pruned: Source) -> None:
    with pytest.raises(PruningError, match="with fewer MLP rows"):
        measure(pruned.directory, base.directory, OPTIONS)
