import os
from pathlib import Path

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # settled when triton is first imported, by whichever test

from curkv.models.loading.default_model import DEFAULT_MODEL, ensure_built_in


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """Directory of the default model, fetched on first use and kept in the user's cache."""
    return ensure_built_in(DEFAULT_MODEL)
