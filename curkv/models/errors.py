"""What can go wrong when a model is named, fetched or read."""

from __future__ import annotations


class ModelError(Exception):
    """A model cannot be used; the message says why and what to do."""


class ModelNotFound(ModelError):
    """Nothing usable is at the given name, path or Hub id."""


class ModelUnreachable(ModelNotFound):
    """The model could not be fetched or kept: network, space, permissions. It may work another time."""


class UnsupportedModel(ModelError):
    """The model exists, but its architecture or one of its settings is not implemented."""
