from pathlib import Path

import pytest

from curkv.models.loading.built_in import DEFAULT_MODEL, ensure_built_in

from . import device  # noqa: F401, before anything imports triton


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """Directory of the default model, fetched on first use and kept in the user's cache."""
    return ensure_built_in(DEFAULT_MODEL)
