"""The web page at `/`: one static file, whose own style and script are all that it may load."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

PAGE = Path(__file__).parents[1] / "page" / "index.html"


def page_routes() -> list[Route]:
    """The route of the page."""
    html = PAGE.read_text(encoding="utf-8")
    headers = {
        "content-security-policy": content_security_policy(html),
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    async def show(request: Request) -> Response:
        """The web page."""
        return HTMLResponse(html, headers=headers)

    return [Route("/", show)]


def content_security_policy(html: str) -> str:
    """Allows the inline style and script of this page by their hashes, requests to its own server, and images that it holds."""
    rules = {
        "default-src": "'none'",
        "script-src": _hashes(html, "script"),
        "style-src": _hashes(html, "style"),
        "img-src": "data: blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hashes(html: str, element: str) -> str:
    contents = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in contents)
