"""Every script of benchmarks/ starts; three that drive an engine in different ways run on a tiny model."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ELSEWHERE = {"peers/openvino_server.py"}
"""Run in an environment that has nothing of curkv."""
PARTS = {"gpu/alone.py", "gpu/engines.py", "gpu/phases.py"}
"""Of gpu/first.py, which finds them beside it."""
SCRIPTS = sorted(
    str(path.relative_to(BENCHMARKS))
    for path in BENCHMARKS.rglob("*.py")
    if str(path.relative_to(BENCHMARKS)) not in ELSEWHERE | PARTS
)


def app_of(name: str) -> typer.Typer:
    app: typer.Typer = import_module(f"benchmarks.{name.removesuffix('.py').replace('/', '.')}").app
    return app


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_it_is_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend((BENCHMARKS / name).parent)  # as for a script that is run
    result = CliRunner().invoke(app_of(name), ["--help"])
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output and f"benchmarks/{name}" in result.output


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of two layers over characters."""
    directory = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer = Tokenizer(WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.save(str(directory / "tokenizer.json"))
    return str(directory)


@pytest.mark.parametrize(
    ("name", "options", "printed"),
    [
        ("exactness.py", "--prompts 3 --longest 60 --new-tokens 3", "of 3, 3 equal batched, 3 alone"),
        ("operations.py", "--concurrency 2 --prompt-tokens 40 --new-tokens 8", "| paged_decode_attention |"),
        ("prefixes.py", "--tokens 100 --questions 2", "| full, prefixes |"),
    ],
)
def test_a_script_runs(model: str, name: str, options: str, printed: str) -> None:
    result = CliRunner().invoke(app_of(name), ["--model", model, *options.split()], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert printed in result.output


def test_an_unknown_option_is_refused() -> None:
    result = CliRunner().invoke(app_of("soak.py"), ["--no-such-option"])
    assert result.exit_code == 2
