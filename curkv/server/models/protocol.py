"""Bodies of GET /v1/models."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ModelCard(BaseModel):
    """A model that can be named in requests.

    Attributes:
        root: what was loaded: built-in name, path or Hub id.
        max_model_len: most tokens of prompt and output together.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "curkv"
    root: str
    max_model_len: int


class ModelList(BaseModel):
    """All models of this server: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
