"""The JSON files of a model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from curkv.models.errors import ModelError


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a JSON object; None if there is no such file.

    Raises:
        ModelError: The file is no JSON, or not an object.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # what is no UTF-8 is a ValueError too
        raise ModelError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a JSON {type(content).__name__}; expected an object, {{...}}")
    return content
