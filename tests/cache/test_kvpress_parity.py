"""Kept sets against kvpress 0.5.5 on real queries, keys and values, gathered by the cache in chunks."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import kvpress
import pytest
import torch
from kvpress.utils import compute_n_kept
from tokenizers import Tokenizer
from torch import Tensor

from curkv.bench import baseline
from curkv.cache.attention import PagedAttention
from curkv.cache.batch import Batch
from curkv.cache.eviction import select
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.observations import Needs
from curkv.cache.page_manager import PageManager
from curkv.cache.parsing import parse_options
from curkv.cache.plan import resolve
from curkv.cache.view import CacheView
from curkv.kernels.dispatch import get_kernels
from curkv.kernels.formats import get_format

LAYERS = (0, 9, 19, 29)
CHUNK = 700
KERNELS = get_kernels("cpu")


@dataclass(frozen=True)
class Layer:
    """One layer's attention module and what went through it, [1, heads, n, head_dim] each."""

    module: Any
    hidden: Tensor
    keys: Tensor
    values: Tensor
    rope: tuple[Tensor, Tensor]

    def attentions(self) -> Tensor:
        """What an eager forward gives: [1, Hq, n, n]."""
        q = kvpress.utils.get_prerope_query_states(self.module, self.hidden)
        cos, sin = (x[:, None] for x in self.rope)
        first, second = q.chunk(2, -1)
        q = q * cos + torch.cat([-second, first], -1) * sin
        group = q.shape[1] // self.keys.shape[1]
        logits = q @ self.keys.repeat_interleave(group, 1).transpose(2, 3) / q.shape[-1] ** 0.5
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu_(1)
        return logits.masked_fill_(hidden, -torch.inf).softmax(-1)


@dataclass(frozen=True)
class Text:
    """A text's layers and the cache's view of it."""

    layers: list[Layer]
    view: CacheView
    layout: CacheLayout


@pytest.fixture(scope="module")
def model(default_model_dir):
    return baseline.load(default_model_dir)


@pytest.fixture(scope="module", params=[1031, 2048])
def text(request, model, default_model_dir) -> Text:
    n = request.param
    words = pydoc_data.topics.topics["typesmapping"] + pydoc_data.topics.topics["specialnames"]
    ids = Tokenizer.from_file(str(default_model_dir / "tokenizer.json")).encode(words).ids[:n]
    assert len(ids) == n
    with torch.no_grad():
        out = model.model(torch.tensor([ids]), use_cache=True, output_hidden_states=True)
        rope = model.model.rotary_emb(out.last_hidden_state, torch.arange(n)[None])
        layers = []
        for index in LAYERS:
            decoder = model.model.layers[index]
            decoder.self_attn.rotary_emb = model.model.rotary_emb
            kept = out.past_key_values.layers[index]
            hidden = decoder.input_layernorm(out.hidden_states[index])
            layers.append(Layer(decoder.self_attn, hidden, kept.keys, kept.values, rope))
        layout = CacheLayout(full_attention(len(LAYERS), 3), 64, 32, get_format("float32"), 1, 2048)
        return Text(layers, observe(layers, layout, n), layout)


def observe(layers: list[Layer], layout: CacheLayout, n: int) -> CacheView:
    """Send everything through a cache that observes what any policy needs."""
    frequencies = 1 / 100_000.0 ** (torch.arange(0, 64, 2) / 64)
    angles = torch.arange(4096)[:, None] * frequencies
    cache = PageManager(layout, layout.sequence_pages(n), KERNELS)
    weights = [layer.module.o_proj.weight.T.reshape(9, 64, -1) for layer in layers]
    attention = PagedAttention(
        cache, [(angles.cos(), angles.sin())] * len(cache.layout.layers), weights.__getitem__
    )
    slot = cache.add_sequence(Needs(queries=64, column_sums=True, query_statistics=True, block=256))
    for start in range(0, n, CHUNK):
        count = min(CHUNK, n - start)
        cache.extend([slot], [count])
        batch = Batch.build([slot], [[0] * count], [start], observed=cache.observed)
        for index, layer in enumerate(layers):
            hidden = layer.hidden[0, start : start + count]
            module = layer.module
            q, k, v = (
                projection(hidden).view(count, -1, 64)
                for projection in (module.q_proj, module.k_proj, module.v_proj)
            )
            attention.attend(index, q.clone(), k.clone(), v.clone(), batch)
    return attention.view(slot)


def our_kept(text: Text, k: int, **raw: object) -> Tensor:
    """bool [L, H, n], what we keep of k tokens per head."""
    plan = resolve(
        parse_options({"budget": k, "preset": "kvpress"} | raw), range(text.view.width), text.layout
    )
    with torch.no_grad():
        indices, counts = select(text.view, plan, KERNELS)
    assert counts.sum() == k * counts.numel()
    mask = torch.zeros(*counts.shape, text.view.width + 1, dtype=torch.bool)
    return mask.scatter_(2, indices.long().masked_fill(indices < 0, text.view.width), True)[..., :-1]


def their_scores(press: kvpress.ScorerPress, layer: Layer, attentions: Tensor | None = None) -> Tensor:
    kwargs = {"position_embeddings": layer.rope}
    with torch.no_grad():
        return press.score(
            layer.module, layer.hidden, layer.keys.clone(), layer.values.clone(), attentions, kwargs
        )


def top(scores: Tensor, k: int) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(k, -1).indices, True)


def overlap(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours & theirs).sum() / theirs.sum())


def score_kept(press: Any, text: Text, k: int, attend: bool = False) -> Tensor:
    """bool [L, H, n], what a score-based press keeps."""
    return torch.cat(
        [top(their_scores(press, x, x.attentions() if attend else None), k) for x in text.layers]
    )


RATIOS = [0.5, 0.75, 0.875]
CASES: dict[str, tuple[Callable[[float], Any], dict[str, object]]] = {
    "snapkv": (lambda r: kvpress.SnapKVPress(r), {"observation": 64}),
    "snapkv-w32-k7": (lambda r: kvpress.SnapKVPress(r, 32, 7), {"policy": "snapkv", "pool": 7}),
    "tova": (lambda r: kvpress.TOVAPress(r), {}),
    "keydiff": (lambda r: kvpress.KeyDiffPress(r), {}),
    "expected-attention": (lambda r: kvpress.ExpectedAttentionPress(r), {}),
    "capkv": (lambda r: kvpress.CapPress(r), {}),
    "criticalkv": (lambda r: kvpress.CriticalKVPress(kvpress.SnapKVPress(r)), {"observation": 64}),
}


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", CASES)
def test_score_presses(text, name, ratio):
    make, raw = CASES[name]
    k = compute_n_kept(text.view.width, ratio)
    ours = our_kept(text, k, **({"policy": name} | raw))
    found = overlap(ours, score_kept(make(ratio), text, k))
    print(f"{name} n={text.view.width} {ratio}: {found:.4f}")
    assert found >= 0.99


@pytest.mark.parametrize("ratio", RATIOS)
def test_h2o_is_observed_attention(text, ratio):
    k = compute_n_kept(text.view.width, ratio)
    ours = our_kept(text, k, policy="h2o", recent_tokens=0)
    found = overlap(ours, score_kept(kvpress.ObservedAttentionPress(ratio), text, k, attend=True))
    print(f"h2o n={text.view.width} {ratio}: {found:.4f}")
    assert found >= 0.99


@pytest.mark.parametrize("ratio", RATIOS)
def test_compactor(text, ratio, monkeypatch):
    """With the same random projection, and without the keys that kvpress pads the last block with.

    kvpress hides those with a logit of -1e-9, so they join the softmax: as it is, 0.980 and more in common.
    """
    k = compute_n_kept(text.view.width, ratio)
    generator = text.view.generator()

    def randn(*shape: int, **_: object) -> Tensor:
        return torch.randn(shape[1:], generator=generator)[None]

    monkeypatch.setattr("kvpress.presses.leverage_press.torch", Patched(randn=randn))
    monkeypatch.setattr(kvpress.NonCausalAttnPress, "non_causal_chunked_attn", staticmethod(block_attention))
    theirs = score_kept(kvpress.CompactorPress(ratio, blending=0.5), text, k)
    found = overlap(our_kept(text, k, policy="compactor", seed=0), theirs)
    print(f"compactor n={text.view.width} {ratio}: {found:.4f}")
    assert found >= 0.99


def block_attention(q: Tensor, k: Tensor, size: int) -> Tensor:
    blocks = zip(q.split(size, 2), k.split(size, 2), strict=True)
    return torch.cat([(a @ b.transpose(2, 3)).softmax(-1).sum(2) for a, b in blocks], -1)


class Patched(SimpleNamespace):
    """torch, some of whose functions are replaced."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def compressed(press: Any, layer: Layer, index: int) -> Tensor:
    """bool [H, n], what a press keeps that compresses by itself: its keys are looked up among all."""
    module = SimpleNamespace(
        config=SimpleNamespace(num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=len(LAYERS)),
        head_dim=64, layer_idx=index, q_proj=layer.module.q_proj,
    )  # fmt: skip
    with torch.no_grad():
        keys, _ = press.compress(
            module, layer.hidden, layer.keys.clone(), layer.values.clone(), None,
            {"position_embeddings": layer.rope},
        )  # fmt: skip
    mark = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, order = (layer.keys[0].double() @ mark).sort(-1)
    found = torch.searchsorted(ours, (keys[0].double() @ mark) - 1e-12)
    kept = torch.zeros(layer.keys.shape[1:3], dtype=torch.bool)
    return kept.scatter_(1, order.gather(1, found.clamp_max(order.shape[1] - 1)), True)


@pytest.mark.parametrize("ratio", RATIOS)
def test_pyramidkv(text, ratio):
    """kvpress rounds each layer's budget, here their sum is exact: a token more or less per layer.

    Where the last layer would hold less than the window kvpress falls back to SnapKV; hence a small window.
    """
    press = kvpress.PyramidKVPress(ratio, window_size=4)
    theirs = torch.stack([compressed(press, layer, i) for i, layer in enumerate(text.layers)])
    k = round(theirs.sum().item() / theirs.shape[0] / theirs.shape[1])
    found = overlap(our_kept(text, k, policy="pyramidkv", observation=4), theirs)
    print(f"pyramidkv n={text.view.width} {ratio}: {found:.4f}")
    assert found >= 0.99


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("scorer", ["snapkv", "curdkv"])
def test_chunkkv(text, scorer, ratio):
    inner = kvpress.SnapKVPress(ratio) if scorer == "snapkv" else kvpress.CURPress(ratio, num_sinks=0)
    for index, layer in enumerate(text.layers):
        theirs = compressed(kvpress.ChunkKVPress(inner), layer, index)
        k = int(theirs[0].sum())
        raw = {"policy": "chunkkv", "scorer": scorer} | (
            {"observation": 64} if scorer == "snapkv" else {"sink_tokens": 0}
        )
        found = overlap(our_kept(text, k, **raw)[index], theirs)
        print(f"chunkkv({scorer}) n={text.view.width} layer {index} {ratio}: {found:.4f}")
        assert found >= 0.99


ADAPTIVE = {
    "snapkv": (kvpress.SnapKVPress, {"observation": 64}),
    "keydiff": (kvpress.KeyDiffPress, {}),
    "expected-attention": (kvpress.ExpectedAttentionPress, {}),
    "knorm": (kvpress.KnormPress, {}),
}


def masked(press: Any, layer: Layer) -> Tensor:
    """bool [H, n], what a press with adaptive heads keeps."""
    attributes = ("q_proj", "o_proj", "head_dim", "rotary_emb", "num_key_value_groups")
    config = SimpleNamespace(
        _attn_implementation="sdpa",
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        hidden_size=576,
    )
    module = SimpleNamespace(config=config, **{name: getattr(layer.module, name) for name in attributes})
    with torch.no_grad():
        press.compress(
            module, layer.hidden, layer.keys.clone(), layer.values.clone(), None,
            {"position_embeddings": layer.rope},
        )  # fmt: skip
    kept = torch.ones(layer.keys.shape[1:3], dtype=torch.bool)
    kept[module.masked_key_indices[1:]] = False
    return kept


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_allocation(text, name, ratio):
    make, raw = ADAPTIVE[name]
    k = compute_n_kept(text.view.width, ratio)
    theirs = torch.stack([masked(kvpress.AdaKVPress(make(ratio)), layer) for layer in text.layers])
    found = overlap(our_kept(text, k, policy=name, allocation="adaptive", **raw), theirs)
    print(f"ada({name}) n={text.view.width} {ratio}: {found:.4f}")
    assert found >= 0.99


@pytest.mark.parametrize("ratio", RATIOS)
def test_adaptive_criticalkv(text, ratio):
    k = compute_n_kept(text.view.width, ratio)
    press = kvpress.CriticalAdaKVPress(kvpress.SnapKVPress(ratio))
    theirs = torch.stack([masked(press, layer) for layer in text.layers])
    ours = our_kept(text, k, policy="criticalkv", allocation="adaptive", observation=64)
    found = overlap(ours, theirs)
    print(f"ada(criticalkv) n={text.view.width} {ratio}: {found:.4f}")
    assert found >= 0.99
