"""What a family of models is: how its files name things, and which blocks its layers are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from curkv.models.blocks import (
    Attention,
    AttentionWeights,
    Feed,
    Head,
    Layer,
    LayerWeights,
    MixtureWeights,
    Mlp,
    MlpWeights,
    Packer,
)
from curkv.models.config import ModelConfig
from curkv.models.errors import UnsupportedModel
from curkv.models.families.gguf_names import GGUF, TENSOR_NAMES, read_metadata
from curkv.models.mixture import Mixture

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class Read(Protocol):
    """Reads a tensor of a checkpoint."""

    def __call__(self, name: str, *shape: int, parts: Sequence[int] = ()) -> Tensor:
        """Returns the tensor of a name, which has this shape, or of it what one of several processes has.

        Args:
            name: Its name.
            shape: Its shape.
            parts: Rows of each of those that it is fused of, one below the other; none: it is one.
        """


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor that a checkpoint holds as a part of another one, or under another name.

    Attributes:
        sources: Names of those that it is made of.
        shape: Its own.
        take: Makes it of them.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    take: Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Norms:
    """Names of a layer's norms; None: there is no such norm.

    Attributes:
        attention: Of what goes into attention.
        mlp: Of what goes into the MLP.
        after_attention: Of what attention adds.
        after_mlp: Of what the MLP adds.
    """

    attention: str | None = "input_layernorm"
    mlp: str | None = "post_attention_layernorm"
    after_attention: str | None = None
    after_mlp: str | None = None


def paired(rows: Tensor, config: ModelConfig) -> Tensor:
    """Orders the channels of each head so that those that rotate together are half a padded head apart.

    Those that do not rotate, and zeros, take the places between. Queries and keys are ordered alike, so that
    no product of two changes.

    Args:
        rows: [heads * head_dim, ...] of queries or keys, as the model has them.
        config: Says which channels rotate together.
    """
    more = config.padded_head_dim - config.head_dim
    if config.rotary_dim == config.head_dim and not config.rope_interleaved and not more:
        return rows
    heads, half = rows.reshape(-1, config.head_dim, *rows.shape[1:]), config.rotary_dim // 2
    rest = config.head_dim // 2 + half
    first, second = heads[:, :half], heads[:, half : 2 * half]
    if config.rope_interleaved:
        first, second = heads[:, : 2 * half : 2], heads[:, 1 : 2 * half : 2]
    zeros = heads.new_zeros(len(heads), more // 2, *heads.shape[2:])
    parts = [first, heads[:, 2 * half : rest], zeros, second, heads[:, rest:], zeros]
    return torch.cat(parts, 1).flatten(0, 1)


def padded(rows: Tensor, config: ModelConfig) -> Tensor:
    """Appends zeros to the channels of each head of rows [heads * head_dim, ...], so that it is padded."""
    more = config.padded_head_dim - config.head_dim
    if not more:
        return rows
    heads = rows.reshape(len(rows) // config.head_dim, config.head_dim, *rows.shape[1:])
    return torch.cat([heads, heads.new_zeros(len(heads), more, *heads.shape[2:])], 1).flatten(0, 1)


def scaled(weight: Tensor, factor: float) -> Tensor:
    """Multiplies a weight by what its product is multiplied by."""
    return weight if factor == 1.0 else weight * factor


class Family(ABC):
    """Models that compute alike. What is written here is Llama's way; a family says where it differs.

    Attributes:
        title: What people call the models, and what is special in them.
        model_type: In `config.json`.
        architectures: Names in `config.json`; the first is the one that generates text.
        gguf_architecture: In GGUF files, if it has a name of its own there.
        gguf_tensors: GGUF names to names in safetensors, without layer and kind.
        gguf_interleaved: Rows of query and key projections lie in GGUF files in pairs that rotate together.
        gguf_settings: Keys of a GGUF file's metadata to those of `config.json`, beside what all have.
        gguf_experts: Of families whose GGUF files name one architecture, this is the one with experts.
        gguf_windows: The family knows what to do about windows that a GGUF file names.
        gguf_norm: Key of the number that is added to the mean square in norms.
        norms: Names of a layer's norms.
        prunable: Layers are Llama's, and their weights are computed with as they are stored.
    """

    title: ClassVar[str]
    model_type: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    gguf_architecture: ClassVar[str | None] = None
    gguf_tensors: ClassVar[Mapping[str, str]] = TENSOR_NAMES
    gguf_interleaved: ClassVar[bool] = False
    gguf_settings: ClassVar[Mapping[str, str]] = {}
    gguf_experts: ClassVar[bool] = False
    gguf_windows: ClassVar[bool] = False
    gguf_norm: ClassVar[str] = "attention.layer_norm_rms_epsilon"
    norms: ClassVar[Norms] = Norms()
    prunable: ClassVar[bool] = True

    @abstractmethod
    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """Reads a parsed `config.json`.

        Raises:
            UnsupportedModel: A setting is missing or not implemented.
        """

    def embedding(self, read: Read, config: ModelConfig) -> Tensor:
        """[vocab, hidden]."""
        return scaled(read(EMBEDDING, config.vocab_size, config.hidden_size), config.embedding_scale)

    def final_norm(self, read: Read, config: ModelConfig) -> Tensor:
        """[hidden]."""
        return self.norm(read, FINAL_NORM, config.hidden_size)

    def head(self, read: Read, config: ModelConfig) -> Tensor:
        """[vocab, hidden]; the embedding if the model ties them."""
        name = EMBEDDING if config.tie_embeddings else HEAD
        return scaled(read(name, config.vocab_size, config.hidden_size), config.logit_scale)

    def embedding_of_head(self, config: ModelConfig) -> float | None:
        """What the head is multiplied with to be the embedding, if it is a multiple of it."""
        return config.embedding_scale / config.logit_scale if config.tie_embeddings else None

    def layer(self, read: Read, config: ModelConfig, index: int) -> LayerWeights:
        """Reads one decoder layer and fuses its projections."""
        prefix, norms = f"model.layers.{index}", self.norms

        def norm(name: str | None) -> Tensor | None:
            return None if name is None else self.norm(read, f"{prefix}.{name}.weight", config.hidden_size)

        attention = self.attention(read, config, f"{prefix}.self_attn")
        if config.mixture is None or index in config.mixture.dense_layers:
            feed: MlpWeights | MixtureWeights = self.mlp(read, config, f"{prefix}.mlp")
        else:
            feed = self.mixture(read, config, f"{prefix}.mlp")
        return LayerWeights(
            replace(attention, norm=norm(norms.attention), post_norm=norm(norms.after_attention)),
            replace(feed, norm=norm(norms.mlp), post_norm=norm(norms.after_mlp)),
        )

    def norm(self, read: Read, name: str, size: int) -> Tensor:
        """Reads what a norm multiplies by, [size]."""
        return read(name, size)

    def attention(self, read: Read, config: ModelConfig, prefix: str) -> AttentionWeights:
        """Reads the weights of attention under a prefix; norms of what goes in and comes out lie elsewhere.

        Rows of queries and keys are brought into the order in which the kernels rotate, and all heads are
        padded, which shrinks their scores: queries are scaled for that.
        """
        q, k, v = self.qkv(read, config, f"{prefix}.{{}}.weight", config.hidden_size)
        bias = self.qkv(read, config, f"{prefix}.{{}}.bias") if config.qkv_bias else None
        sinks = read(f"{prefix}.sinks", config.num_heads) if config.sinks else None
        q_norm = k_norm = None
        if config.qk_norm and config.padded_head_dim > config.head_dim:
            raise UnsupportedModel(
                f"head_dim ({config.head_dim}) must be a multiple of 8 where heads are normalised"
            )
        if config.qk_norm:
            head, whole = config.head_dim, config.qk_norm_whole
            q_norm = self.norm(read, f"{prefix}.q_norm.weight", config.q_size if whole else head)
            k_norm = self.norm(read, f"{prefix}.k_norm.weight", config.kv_size if whole else head)
            q_norm, k_norm = scaled(paired(q_norm, config), config.query_scale), paired(k_norm, config)
        scale = 1.0 if config.qk_norm else config.query_scale
        scale *= (config.padded_head_dim / config.head_dim) ** 0.5

        def ordered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.cat([scaled(paired(q, config), scale), paired(k, config), padded(v, config)])

        return AttentionWeights(
            norm=None,
            qkv=ordered(q, k, v),
            o=self.attention_output(read, config, prefix),
            qkv_bias=ordered(*bias) if bias else None,
            o_bias=self.out(read, config, f"{prefix}.o_proj.bias") if config.o_bias else None,
            q_norm=q_norm,
            k_norm=k_norm,
            sinks=sinks,
        )

    def qkv(self, read: Read, config: ModelConfig, name: str, *columns: int) -> list[Tensor]:
        """Reads weights or biases of queries, keys and values; the projection's name goes into `name`."""
        rows = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
        return [read(name.format(part), size, *columns) for part, size in rows.items()]

    def mlp(self, read: Read, config: ModelConfig, prefix: str) -> MlpWeights:
        """Reads the weights of an MLP under a prefix; norms of what goes in and comes out lie elsewhere."""
        return MlpWeights(
            norm=None,
            gate_up=self.gate_up(read, config, f"{prefix}.{{}}.weight", config.hidden_size),
            down=self.out(read, config, f"{prefix}.down_proj.weight", config.intermediate_size),
            gate_up_bias=self.gate_up(read, config, f"{prefix}.{{}}.bias") if config.mlp_bias else None,
            down_bias=self.out(read, config, f"{prefix}.down_proj.bias") if config.mlp_bias else None,
        )

    def mixture(self, read: Read, config: ModelConfig, prefix: str) -> MixtureWeights:
        """Reads the weights of experts under a prefix, one by one when they are asked for."""
        assert config.mixture is not None
        mixture, hidden = config.mixture, config.hidden_size
        expert = replace(config, intermediate_size=mixture.intermediate_size)
        shared = None
        if mixture.shared_size:
            shared = self.mlp(
                read, replace(config, intermediate_size=mixture.shared_size), f"{prefix}.shared_expert"
            )
        return MixtureWeights(
            norm=None,
            router=read(f"{prefix}.gate.weight", mixture.num_experts, hidden),
            experts=(self.mlp(read, expert, f"{prefix}.experts.{i}") for i in range(mixture.num_experts)),
            shared=shared,
            shared_gate=read(f"{prefix}.shared_expert_gate.weight", 1, hidden) if shared else None,
        )

    def gate_up(self, read: Read, config: ModelConfig, name: str, *columns: int) -> Tensor:
        """Reads weights or biases of gate above up; the projection's name goes into `name`."""
        parts = ("gate_proj", "up_proj")
        return torch.cat([read(name.format(part), config.intermediate_size, *columns) for part in parts])

    def attention_output(self, read: Read, config: ModelConfig, prefix: str) -> Tensor:
        """[hidden, channels of padded heads], the weight of the output projection under a prefix."""
        weight = self.out(read, config, f"{prefix}.o_proj.weight", config.q_size)
        return padded(weight.T, config).T if config.padded_head_dim > config.head_dim else weight

    def out(self, read: Read, config: ModelConfig, name: str, *columns: int) -> Tensor:
        """Reads the weight or bias of a projection whose rows are the channels of the residual stream."""
        return scaled(read(name, config.hidden_size, *columns), config.residual_scale)

    def layer_blocks(self, config: ModelConfig, index: int, weights: LayerWeights, pack: Packer) -> Layer:
        """Makes a layer that runs."""
        return Layer(
            Attention(config, index, weights.attention, pack), self.feed_block(config, weights, pack)
        )

    def feed_block(self, config: ModelConfig, weights: LayerWeights, pack: Packer) -> Feed:
        """Makes what follows the attention in a layer."""
        if isinstance(weights.feed, MixtureWeights):
            return Mixture(config, weights.feed, pack)
        return Mlp(config, weights.feed, pack)

    def head_block(self, config: ModelConfig, norm: Tensor, weight: Tensor, pack: Packer) -> Head:
        """Makes what turns the last layer's rows into logits."""
        return Head(config, norm, weight, pack)

    def tensors(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Returns the name and shape of each tensor that a checkpoint has to hold."""
        shapes: dict[str, tuple[int, ...]] = {}

        def note(name: str, *shape: int, parts: Sequence[int] = ()) -> Tensor:
            shapes[name] = shape
            return torch.empty(0, *shape[1:])  # with its columns and none of its rows

        for part in (self.embedding, self.final_norm, self.head):
            part(note, config)
        for index in range(config.num_layers):
            feed = self.layer(note, config, index).feed
            if isinstance(feed, MixtureWeights):
                list(feed.experts)
        return shapes

    def pieces(self, found: Mapping[str, tuple[int, ...]], config: ModelConfig) -> dict[str, Piece]:
        """Returns which tensors are made of others in a checkpoint that stores them in another way.

        Args:
            found: Shape of each tensor of the checkpoint.
            config: The model.
        """
        return {}

    def values_of_gguf(self, name: str, values: npt.NDArray[Any], config: ModelConfig) -> npt.NDArray[Any]:
        """Returns the values in safetensors of a tensor with this name there, from those in a GGUF file.

        Of a matrix it may be given the bytes of the rows: it puts these into another order and no more.
        """
        heads = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}
        count = next((count for part, count in heads.items() if part in name), None)
        if not self.gguf_interleaved or count is None:
            return values
        pairs = values.reshape(count, config.head_dim // 2, 2, -1)
        return pairs.swapaxes(1, 2).reshape(values.shape)

    def config_of_gguf(self, gguf: GGUF) -> dict[str, Any]:
        """Returns the `config.json` that describes a GGUF file.

        Raises:
            UnsupportedModel: A setting is not implemented.
        """
        return {
            "architectures": [self.architectures[0]],
            "model_type": self.model_type,
            **read_metadata(
                gguf, windows=self.gguf_windows, norm=self.gguf_norm, settings=self.gguf_settings
            ),
            **{key: gguf.setting(name) for name, key in self.gguf_settings.items()},
        }

    def tensor_of_gguf(self, name: str) -> str:
        """Returns the name in safetensors of a GGUF tensor, such as `blk.3.attn_q.weight`.

        One that holds something of all experts has braces for an expert's number.

        Raises:
            UnsupportedModel: The family has no such tensor.
        """
        stem, _, kind = name.rpartition(".")
        prefix = ""
        if stem.startswith("blk.") and stem.count(".") > 1:
            _, layer, stem = stem.split(".", 2)
            prefix = f"model.layers.{layer}."
        if stem not in self.gguf_tensors:
            raise UnsupportedModel(f"unsupported tensor {name} in a GGUF file of {self.gguf_architecture}")
        return f"{prefix}{self.gguf_tensors[stem]}.{kind}"

    def name_in_gguf(self, name: str) -> str:
        """Returns what a tensor is called in a GGUF file; its own name if the family has no such tensor."""
        stem, _, kind = name.rpartition(".")
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            prefix = f"blk.{layer}."
        names = {tensor: found for found, tensor in self.gguf_tensors.items()}
        return f"{prefix}{names[stem]}.{kind}" if stem in names else name
