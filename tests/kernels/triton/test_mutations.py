from __future__ import annotations

import pytest

from tests.kernels.triton.mutations import MUTATIONS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.operation}: {m.what}")
def test_the_mutation_still_fits_the_source(mutation):
    assert mutation.source.read_text().count(mutation.old) == 1
