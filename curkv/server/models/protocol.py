"""Bodies of GET /v1/models."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class PruningCard(BaseModel):
    """How `curkv prune` made a model.

    Attributes:
        method: its `--method`.
        removed: share of each MLP's rows that is gone.
        base: what the model before was called.
    """

    method: str
    removed: float
    base: str


class ModelCard(BaseModel):
    """A model that can be named in requests.

    Attributes:
        root: what was loaded: built-in name, path or Hub id.
        max_model_len: most tokens of prompt and output together.
        max_kv_tokens: as many of them as the cache has room for if a request keeps all.
        weights: type of its linear layers' weights: float32, int8, int4 or bfloat16.
        weights_bytes: memory of all its weights.
        kv_dtype: format of cached keys and values, as `--kv-dtype` names it.
        pruning: null if it was not pruned.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "curkv"
    root: str
    max_model_len: int
    max_kv_tokens: int
    weights: str
    weights_bytes: int
    kv_dtype: str
    pruning: PruningCard | None = None


class Props(BaseModel):
    """The model as llama.cpp describes it.

    Attributes:
        default_generation_settings: `n_ctx`, most tokens of prompt and output together.
        total_slots: most sequences in flight at once.
        model_path: what was loaded.
        chat_template: empty for a model without one.
        bos_token, eos_token: texts of the tokens that begin and end a text, empty if there are none.
    """

    default_generation_settings: dict[str, int]
    total_slots: int
    model_path: str
    chat_template: str
    bos_token: str
    eos_token: str
    modalities: dict[str, bool] = {"vision": False, "audio": False}
    build_info: str


class ModelList(BaseModel):
    """All models of this server: one, under each of its names."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
