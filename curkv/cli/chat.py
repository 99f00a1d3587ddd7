"""`curkv chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from curkv.cli.failing import fail

app = typer.Typer(rich_markup_mode=None)


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="Base URL of a server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key of the server.")] = None,
    document: Annotated[Path | None, typer.Option(help="Text file to talk about.")] = None,
    policy: Annotated[str | None, typer.Option(help="Eviction policy.")] = None,
    budget: Annotated[str | None, typer.Option(help="Its budget, such as 25%.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    session: Annotated[
        str, typer.Option(help="Name of a conversation: what was said under it before goes on.")
    ] = "",
) -> None:
    """Talk to a server in the terminal; after each answer a line tells what its cache kept."""
    from curkv.cache.options import OptionError
    from curkv.chat import Conversation, loop
    from curkv.models.loading.cache_directory import cache_directory
    from curkv.server.headers import session_name

    kv = {name: value for name, value in (("policy", policy), ("budget", budget)) if value is not None}
    try:
        text = document.read_text() if document is not None else None
    except (OSError, ValueError) as error:
        fail(f"cannot read {document}: {error}")
    file = cache_directory() / "conversations" / f"{session}.json" if session else None
    try:
        session_name(session)
        conversation = Conversation(url, api_key, text, kv, max_tokens, temperature, session, file)
    except OptionError as error:
        fail(f"--session: {error.message}")
    except (OSError, ValueError) as error:
        fail(f"cannot read {file}: {error}")
    if conversation.messages:
        print(f"[{len(conversation.messages)} messages of before]")
    loop(conversation, lambda: input("> "), lambda text: print(text, end="", flush=True))
