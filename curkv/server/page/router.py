"""The pages at / and /conversation, and the files they are made of."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader

FOLDER = Path(__file__).parent

# Everything comes from this server, and nothing else can be loaded or embed it.
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

_PAGES = Environment(loader=FileSystemLoader(FOLDER / "pages"), autoescape=True, keep_trailing_newline=True)

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> HTMLResponse:
    """The page."""
    return _page("index.html")


@router.get("/conversation")
async def conversation() -> HTMLResponse:
    """The page of a conversation."""
    return _page("conversation.html")


def _page(name: str) -> HTMLResponse:
    """A page within the frame that both have."""
    return HTMLResponse(_PAGES.get_template(name).render(), headers=SECURITY_HEADERS)


files = StaticFiles(directory=FOLDER / "static")
"""Served below /page."""
