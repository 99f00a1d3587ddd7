"""Options of commands that are fields of `curkv.config`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from curkv.config import OPTIONS, Option

Command = Callable[..., None]

_KINDS = {"string": "str", "array": "str", "number": "float", "integer": "int"}


def takes(options: Iterable[str], *, environment: bool = False) -> Callable[[Command], Command]:
    """Gives a command an option for each of the settings named; its `**given` gets those that were used.

    Values stay text: what they mean, and which are refused, is decided where the settings are made.

    Args:
        options: names in `OPTIONS`.
        environment: the command reads their variables too, so that its help names them.
    """

    def decorate(command: Command) -> Command:
        declared = inspect.signature(command, eval_str=True).parameters.values()
        own = [parameter for parameter in declared if parameter.kind != parameter.VAR_KEYWORD]
        added = [_parameter(OPTIONS[name], environment) for name in options]
        inspected: Any = command
        inspected.__signature__ = inspect.Signature([*own, *added])
        inspected.__annotations__ = {p.name: p.annotation for p in (*own, *added)}
        return command

    return decorate


def _parameter(option: Option, environment: bool) -> inspect.Parameter:
    kind = option.schema["type"]
    values: Any = {"boolean": bool | None, "array": list[str] | None}.get(kind, str | None)
    declared = typer.Option(
        help=_help(option, environment),
        show_default=False,
        metavar=None if kind == "boolean" else metavar(option),
        rich_help_panel=option.group,
        autocompletion=_completion(option),
    )
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[values, declared]
    )


def _completion(option: Option) -> Callable[[str], list[str]] | None:
    """What a shell completes a value with; None: as it likes, such as with names of files."""
    values: list[str] | None = option.schema.get("enum")

    def complete(incomplete: str) -> list[str]:
        return [value for value in values or () if value.startswith(incomplete)]

    return complete if values else None


def metavar(option: Option) -> str:
    """What kind of value an option takes."""
    if "enum" in option.schema:
        return "|".join(option.schema["enum"])
    kind = str(option.schema.get("format", option.schema["type"]))
    return f"<{_KINDS.get(kind, kind)}>"


def _help(option: Option, environment: bool) -> str:
    notes = []
    if option.default_text is not None:
        notes.append(f"default: {option.default_text}")
    if environment:
        notes.append(f"env: {option.variable}")
    return f"{option.description} [{'; '.join(notes)}]" if notes else option.description


class Grouped(TyperCommand):
    """A command whose help lists its options under the titles of their sections."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes one list for each section."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def table() -> Iterator[str]:
    """Markdown with a row for each option, as it is in docs/operations.md."""
    yield "| option | variable | default | |"
    yield "|---|---|---|---|"
    for option in OPTIONS.values():
        default = f"`{option.default_text}`" if option.default_text is not None else ""
        yield f"| `{option.flag}` | `{option.variable}` | {default} | {option.description} |"
