"""The HTTP application: which path leads where."""

from collections.abc import Collection, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flashdiff.server.calls import Calls
from flashdiff.server.health import Health
from flashdiff.server.http.front import Front
from flashdiff.server.http.images_api import ImagesApi
from flashdiff.server.http.kserve import KServeApi
from flashdiff.server.http.openapi import describe_routes
from flashdiff.server.http.origins import Origins
from flashdiff.server.http.page import page_routes
from flashdiff.server.metrics import Metrics
from flashdiff.server.requests import Requests
from flashdiff.server.triton import TritonService


def http_app(
    health: Health,
    requests: Requests,
    triton: TritonService,
    metrics: Metrics,
    calls: Calls,
    *,
    host: str,
    allowed_origins: Collection[str],
    aliases: Mapping[str, str],
) -> Front:
    """The ASGI application of a server that listens on `host`."""

    async def show_live(request: Request) -> Response:
        """200 while a device thread lives, else 503."""
        return Response(status_code=200 if health.is_live else 503)

    async def show_ready(request: Request) -> Response:
        """200 while requests are taken, else 503."""
        return Response(status_code=200 if health.is_ready else 503)

    async def show_metrics(request: Request) -> Response:
        """Prometheus metrics."""
        metrics.count()
        return Response(generate_latest(metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def show_openapi(request: Request) -> Response:
        """This document."""
        return JSONResponse(describe_routes(routes))

    routes = [
        Route("/health/live", show_live),
        Route("/health/ready", show_ready),
        Route("/metrics", show_metrics),
        Route("/openapi.json", show_openapi),
        *ImagesApi(requests, aliases).routes,
        *KServeApi(triton, requests.threads).routes,
        *page_routes(),
    ]
    return Front(routes, calls, Origins(host, allowed_origins))
