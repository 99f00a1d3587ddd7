"""What a family of models is: how its files name things, and which blocks its layers are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from tokenizers import normalizers, pre_tokenizers
from torch import Tensor

from curkv.models.blocks import (
    Attention,
    AttentionWeights,
    Head,
    Layer,
    LayerWeights,
    Mlp,
    MlpWeights,
    Packer,
)
from curkv.models.config import ModelConfig
from curkv.models.errors import UnsupportedModel
from curkv.models.families.gguf_names import GGUF, TENSOR_NAMES, read_metadata

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class Read(Protocol):
    """Reads a tensor of a checkpoint."""

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Returns the tensor of a name, which has this shape."""


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How byte-level BPE of a GGUF file cuts text into the words that it merges within.

    Attributes:
        make: Cuts and maps to bytes.
        normalizer: What is done to the text before.
        adds_bos: The bos token is put first unless the file says otherwise.
        whole_words: Words that are tokens are not merged.
    """

    make: Callable[[], pre_tokenizers.PreTokenizer]
    normalizer: Callable[[], normalizers.Normalizer] | None = None
    adds_bos: bool = False
    whole_words: bool = False


class Family(ABC):
    """Models that compute alike. What is written here is Llama's way; a family says where it differs.

    Attributes:
        model_type: In `config.json`.
        architectures: Names in `config.json`; the first is the one that generates text.
        gguf_architecture: In GGUF files, if it has a name of its own there.
        gguf_tensors: GGUF names to names in safetensors, without layer and kind.
        gguf_interleaved: Rows of query and key projections lie in GGUF files in pairs that rotate together.
        pre_tokenizers: Those that came with the family, by their names in GGUF files.
    """

    model_type: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    gguf_architecture: ClassVar[str | None] = None
    gguf_tensors: ClassVar[Mapping[str, str]] = TENSOR_NAMES
    gguf_interleaved: ClassVar[bool] = False
    pre_tokenizers: ClassVar[Mapping[str, PreTokenizer]] = {}

    @abstractmethod
    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """Reads a parsed `config.json`.

        Raises:
            UnsupportedModel: A setting is missing or not implemented.
        """

    def embedding(self, read: Read, config: ModelConfig) -> Tensor:
        """[vocab, hidden]."""
        return read(EMBEDDING, config.vocab_size, config.hidden_size)

    def final_norm(self, read: Read, config: ModelConfig) -> Tensor:
        """[hidden]."""
        return read(FINAL_NORM, config.hidden_size)

    def head(self, read: Read, config: ModelConfig) -> Tensor:
        """[vocab, hidden]; the embedding if the model ties them."""
        name = EMBEDDING if config.tie_embeddings else HEAD
        return read(name, config.vocab_size, config.hidden_size)

    def layer(self, read: Read, config: ModelConfig, index: int) -> LayerWeights:
        """Reads one decoder layer and fuses its projections."""
        prefix = f"model.layers.{index}"
        return LayerWeights(
            self.attention(read, config, f"{prefix}.self_attn", f"{prefix}.input_layernorm"),
            self.mlp(read, config, f"{prefix}.mlp", f"{prefix}.post_attention_layernorm"),
        )

    def attention(self, read: Read, config: ModelConfig, prefix: str, norm: str) -> AttentionWeights:
        """Reads the weights of attention under a prefix, and the norm of its input."""
        hidden, head_dim = config.hidden_size, config.head_dim
        rows = {"q": config.q_size, "k": config.kv_size, "v": config.kv_size}
        qkv = [read(f"{prefix}.{name}_proj.weight", size, hidden) for name, size in rows.items()]
        bias = config.qkv_bias and [read(f"{prefix}.{name}_proj.bias", size) for name, size in rows.items()]
        return AttentionWeights(
            norm=read(f"{norm}.weight", hidden),
            qkv=torch.cat(qkv),
            o=read(f"{prefix}.o_proj.weight", hidden, config.q_size),
            qkv_bias=torch.cat(bias) if bias else None,
            o_bias=read(f"{prefix}.o_proj.bias", hidden) if config.o_bias else None,
            q_norm=read(f"{prefix}.q_norm.weight", head_dim) if config.qk_norm else None,
            k_norm=read(f"{prefix}.k_norm.weight", head_dim) if config.qk_norm else None,
        )

    def mlp(self, read: Read, config: ModelConfig, prefix: str, norm: str) -> MlpWeights:
        """Reads the weights of an MLP under a prefix, and the norm of its input."""
        hidden, width, parts = config.hidden_size, config.intermediate_size, ("gate", "up")
        gate_up = [read(f"{prefix}.{name}_proj.weight", width, hidden) for name in parts]
        bias = config.mlp_bias and [read(f"{prefix}.{name}_proj.bias", width) for name in parts]
        return MlpWeights(
            norm=read(f"{norm}.weight", hidden),
            gate_up=torch.cat(gate_up),
            down=read(f"{prefix}.down_proj.weight", hidden, width),
            gate_up_bias=torch.cat(bias) if bias else None,
            down_bias=read(f"{prefix}.down_proj.bias", hidden) if config.mlp_bias else None,
        )

    def attention_output(self, read: Read, config: ModelConfig, index: int) -> Tensor:
        """[hidden, q_size], the weight of a layer's output projection."""
        return read(f"model.layers.{index}.self_attn.o_proj.weight", config.hidden_size, config.q_size)

    def layer_blocks(self, config: ModelConfig, index: int, weights: LayerWeights, pack: Packer) -> Layer:
        """Makes a layer that runs."""
        return Layer(Attention(config, index, weights.attention, pack), Mlp(config, weights.mlp, pack))

    def head_block(self, config: ModelConfig, norm: Tensor, weight: Tensor, pack: Packer) -> Head:
        """Makes what turns the last layer's rows into logits."""
        return Head(config, norm, weight, pack)

    def tensors(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Returns the name and shape of each tensor that a checkpoint has to hold."""
        shapes: dict[str, tuple[int, ...]] = {}

        def note(name: str, *shape: int) -> Tensor:
            shapes[name] = shape
            return torch.empty(0, *shape[1:])  # with its columns and none of its rows

        for part in (self.embedding, self.final_norm, self.head):
            part(note, config)
        for index in range(config.num_layers):
            self.layer(note, config, index)
        return shapes

    def config_of_gguf(self, gguf: GGUF) -> dict[str, Any]:
        """Returns the `config.json` that describes a GGUF file.

        Raises:
            UnsupportedModel: A setting is not implemented.
        """
        return {
            "architectures": [self.architectures[0]],
            "model_type": self.model_type,
            **read_metadata(gguf),
        }

    def tensor_of_gguf(self, name: str) -> str:
        """Returns the name in safetensors of a GGUF tensor, such as `blk.3.attn_q.weight`.

        Raises:
            UnsupportedModel: The family has no such tensor.
        """
        stem, _, kind = name.rpartition(".")
        prefix = ""
        if stem.startswith("blk."):
            _, layer, stem = stem.split(".", 2)
            prefix = f"model.layers.{layer}."
        if stem not in self.gguf_tensors:
            raise UnsupportedModel(f"unsupported tensor {name} in a GGUF file of {self.gguf_architecture}")
        return f"{prefix}{self.gguf_tensors[stem]}.{kind}"
