"""Which format a model's chat template speaks."""

from __future__ import annotations

from curkv.models.tools.base import ToolFormat
from curkv.models.tools.harmony import Harmony
from curkv.models.tools.hermes import Hermes
from curkv.models.tools.llama import LlamaJSON
from curkv.models.tools.mistral import MistralList, MistralNamed
from curkv.models.tools.pythonic import Gemma, Pythonic

_SIGNS: tuple[tuple[tuple[str, ...], type[ToolFormat]], ...] = (
    (("<tool_call>",), Hermes),
    (("<|channel|>",), Harmony),
    (("[TOOL_CALLS]", "[ARGS]"), MistralNamed),
    (("[TOOL_CALLS]",), MistralList),
    (("[func_name1(",), Pythonic),
    (("<|start_header_id|>", "ipython"), LlamaJSON),
    (("tool_code",), Gemma),
)
"""What stands in the templates of each; the first that fits is taken."""


def format_of(template: str) -> ToolFormat:
    """The format whose signs stand in a template; Hermes' if there are none, as the preamble asks for it."""
    for signs, tool_format in _SIGNS:
        if all(sign in template for sign in signs):
            return tool_format()
    return Hermes()
