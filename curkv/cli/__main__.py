"""`python -m curkv.cli`."""

from __future__ import annotations

import sys

from curkv.cli import app

sys.exit(app())
