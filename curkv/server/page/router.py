"""The pages at / and /conversation, and the files they are made of."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

FOLDER = Path(__file__).parent / "static"

# Everything comes from this server, and nothing else can be loaded or embed it.
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> FileResponse:
    """The page."""
    return FileResponse(FOLDER / "index.html", headers=SECURITY_HEADERS)


@router.get("/conversation")
async def conversation() -> FileResponse:
    """The page of a conversation."""
    return FileResponse(FOLDER / "conversation.html", headers=SECURITY_HEADERS)


files = StaticFiles(directory=FOLDER)
"""Served below /page."""
