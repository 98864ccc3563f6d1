"""`/openapi.json`: what the server takes, for tools that read it."""

from typing import Any

import flashdiff

OPENAPI: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "flashdiff", "version": flashdiff.__version__},
    "paths": {},
}
