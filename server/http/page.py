"""The web page at `/`: one static file, served where the package has it."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

PAGE = Path(__file__).parents[1] / "page" / "index.html"


def page_routes() -> list[Route]:
    """The route of the page; none where there is no page."""
    if not PAGE.is_file():
        return []
    html = PAGE.read_text(encoding="utf-8")

    async def show(request: Request) -> Response:
        """The web page."""
        return HTMLResponse(html)

    return [Route("/", show)]
