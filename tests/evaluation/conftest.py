"""A random Llama of two layers over characters, so that the evaluation runs in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from curkv.cache.attention import PagedAttention
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.page_manager import PageManager
from curkv.engine.engine import Engine
from curkv.engine.runner import Runner
from curkv.kernels.dispatch import get_kernels
from curkv.kernels.formats import get_format
from curkv.models.blocks import AttentionWeights, LayerWeights, MlpWeights
from curkv.models.config import ModelConfig
from curkv.models.decoder import Decoder
from curkv.models.families import read_config
from curkv.models.info import ModelInfo
from curkv.models.rope import rope_tables

MakeEngine = Callable[..., Engine]
MAX_TOKENS = 2048


class RandomCheckpoint:
    """Weights drawn at random, large enough that attention is not flat."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._generator = torch.Generator().manual_seed(0)
        self.embedding = self._draw(config.vocab_size, config.hidden_size)
        self.head = self._draw(config.vocab_size, config.hidden_size)
        self.final_norm = torch.ones(config.hidden_size)

    def layer(self, index: int) -> LayerWeights:
        config, hidden = self._config, self._config.hidden_size
        return LayerWeights(
            AttentionWeights(
                norm=torch.ones(hidden),
                qkv=self._draw(config.q_size + 2 * config.kv_size, hidden),
                o=self._draw(hidden, config.q_size),
            ),
            MlpWeights(
                norm=torch.ones(hidden),
                gate_up=self._draw(2 * config.intermediate_size, hidden),
                down=self._draw(hidden, config.intermediate_size),
            ),
        )

    def _draw(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=self._generator) * 1.5 * columns**-0.5


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A token per character."""
    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.fixture(scope="session")
def make_engine(tokenizer: Tokenizer) -> MakeEngine:
    config = read_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": MAX_TOKENS,
            "rms_norm_eps": 1e-5,
        }
    )
    kernels = get_kernels("reference")
    model = Decoder(config, RandomCheckpoint(config), kernels)

    def make(num_pages: int = 4000, max_sequences: int = 32) -> Engine:
        layout = CacheLayout(full_attention(2, 2), 16, 16, get_format("float32"), max_sequences, MAX_TOKENS)
        attention = PagedAttention(PageManager(layout, num_pages, kernels), rope_tables(config))
        return Engine(Runner(model, attention), ModelInfo(tokenizer), 256, MAX_TOKENS)

    return make


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
