"""The pages that a server shows in a browser: the chat at `/`, and its status at `/status`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

_FOLDER = Path(__file__).parent / "page"
_HEADERS = {
    # Scripts, styles and requests are of this server only, and no script or style stands in the page itself.
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # after an update, the files of a page are of one version
}


class _Files(StaticFiles):
    """The files of the pages, with the same headers."""

    def file_response(self, *args: Any, **settings: Any) -> Response:
        response = super().file_response(*args, **settings)
        response.headers.update(_HEADERS)
        return response


def page_routes() -> list[Route | Mount]:
    """The routes of the pages and their files. They need no key: the page sends the user's key with its requests."""
    return [
        Route("/", _page("index.html")),
        Route("/status", _page("status.html")),
        Mount("/page", _Files(directory=_FOLDER)),
    ]


def _page(name: str) -> Callable[[Request], Response]:
    return lambda _: FileResponse(_FOLDER / name, headers=_HEADERS)
