from collections.abc import Iterator
from pathlib import Path

import pytest

from . import device  # noqa: F401, isort: skip, before anything imports triton
from curkv.models.loading import packed
from curkv.models.loading.built_in import DEFAULT_MODEL, ensure_built_in


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """Directory of the default model, fetched on first use and kept in the user's cache."""
    return ensure_built_in(DEFAULT_MODEL)


@pytest.fixture(scope="session", autouse=True)
def packed_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps what tests pack out of the user's cache; one with a cache of its own has it there."""
    directory, users = packed.packed_directory, packed.packed_directory()
    kept = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "packed_directory", lambda: kept if directory() == users else directory())
        yield
