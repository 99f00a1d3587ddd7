import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from . import device  # noqa: F401, isort: skip, before anything imports triton
from curkv.models.loading import packed
from curkv.models.loading.built_in import DEFAULT_MODEL, ensure_built_in

# The same examples every time: what passes here passes elsewhere. --hypothesis-profile default tries others.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


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


@pytest.fixture(scope="module", autouse=True)
def logging_as_before() -> Iterator[None]:
    """Takes back what a server run in this process configures: other modules count log lines."""
    loggers = [logging.getLogger(name) for name in ("", "curkv", "uvicorn.access")]
    before = [(logger.level, logger.handlers[:], logger.filters[:]) for logger in loggers]
    yield
    for logger, (level, handlers, filters) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:], logger.filters[:] = handlers, filters
