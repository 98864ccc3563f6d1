"""OpenAI's images API: `/v1/images/generations`, `/v1/images/edits` and `/v1/models`, translated for `requests`."""

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flashdiff.errors import FlashdiffError, RequestError
from flashdiff.server.http.errors import error_body, status_of
from flashdiff.server.http.fields import check_content_type, remaining_s
from flashdiff.server.http.forms import read_form
from flashdiff.server.http.front import Exchange, exchange_of
from flashdiff.server.http.images_reply import (
    EDIT,
    GENERATION,
    EventNames,
    partial_steps,
    write_completed,
    write_event,
    write_images,
    write_model,
    write_models,
    write_partial,
)
from flashdiff.server.http.images_request import ImagesRequest, name_files, read_form_value, read_images_request, read_json
from flashdiff.server.http.sending import Closing, Streaming
from flashdiff.server.images import enlarge, white_where_transparent
from flashdiff.server.jobs import Step
from flashdiff.server.models import Model
from flashdiff.server.requests import Reply, Requests

_LARGE_BYTES = 256 * 1024  # of images: to write these as JSON is too long for the event loop
_OF_STREAMS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # nginx would hold events back


class ImagesApi:
    """The routes; `aliases` are further names of models."""

    def __init__(self, requests: Requests, aliases: Mapping[str, str]) -> None:
        self._requests, self._aliases = requests, dict(aliases)
        self._started = int(time.time())

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/v1/images/generations", self._generate, methods=["POST"]),
            Route("/v1/images/edits", self._edit, methods=["POST"]),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name:path}", self._show_model),
        ]

    async def _generate(self, request: Request) -> Response:
        """Make images of a prompt."""
        check_content_type(request, "application/json")
        exchange = exchange_of(request)
        fields = read_json(exchange.body)
        model = self._model(fields.get("model"))
        asked = read_images_request(fields, {}, model.components.spec, remaining_s(request))
        return await self._respond(model, asked, exchange, GENERATION)

    async def _edit(self, request: Request) -> Response:
        """Make images that start from an image, or where a mask is transparent."""
        check_content_type(request, "multipart/form-data")
        exchange, threads = exchange_of(request), self._requests.threads
        client, content_type = exchange.call.client, request.headers["content-type"]
        form = await threads.read(client, read_form, content_type, exchange.body)
        files = name_files(form.files)
        if "image" not in files:
            raise RequestError("image", None, "it is required")
        fields = {name: read_form_value(name, text) for name, text in form.texts.items()}
        model = self._model(fields.get("model"))
        asked = read_images_request(fields, files, model.components.spec, remaining_s(request))
        if "mask" in files:
            mask = await threads.read(client, white_where_transparent, files["mask"])
            asked = replace(asked, request=replace(asked.request, files={**files, "mask": mask}))
        return await self._respond(model, asked, exchange, EDIT)

    async def _list_models(self, request: Request) -> Response:
        """The models and their aliases."""
        return JSONResponse(
            write_models(self._requests.models.served, self._aliases, self._started, await self._requests.loras.names())
        )

    async def _show_model(self, request: Request) -> Response:
        """One model."""
        name = request.path_params["name"]
        if not name:
            raise HTTPException(404)
        return JSONResponse(write_model(name, self._model(name), self._started, await self._requests.loras.names()))

    def _model(self, name: object) -> Model:
        """The model of a name or alias; the default without one. A name of the wrong type is refused with the other fields."""
        text = name if isinstance(name, str) else ""
        return self._requests.models.get(self._aliases.get(text, text))

    async def _respond(self, model: Model, asked: ImagesRequest, exchange: Exchange, names: EventNames) -> Response:
        """A response that keeps the request's place until it is sent."""
        updates = self._requests.serve(model, asked.request, exchange.call.client)
        first = await anext(updates)  # a refusal comes with its own status, before the response begins
        created = int(time.time())
        if asked.stream:
            events = self._events(model, asked, first, updates, created, exchange, names)
            return Streaming(events, media_type="text/event-stream", headers=_OF_STREAMS)
        assert isinstance(first, Reply)
        return Closing(await self._written(write_images, first, created), updates, media_type="application/json")

    async def _events(
        self,
        model: Model,
        asked: ImagesRequest,
        first: Step | Reply,
        updates: AsyncGenerator[Step | Reply, None],
        created: int,
        exchange: Exchange,
        names: EventNames,
    ) -> AsyncGenerator[bytes, None]:
        """The partial images and the images; an error is the last event."""
        async with aclosing(updates):
            try:
                update: Step | Reply | None = first
                while update is not None:
                    if isinstance(update, Step):
                        shown = partial_steps(update.total, asked.partial_images)
                        if update.step in shown:
                            yield await self._partial(model, asked, update, shown.index(update.step), created, names)
                    else:
                        for index in range(len(update.files)):
                            yield await self._written(write_completed, update, index, created, names)
                    update = await anext(updates, None)
            except FlashdiffError as error:
                exchange.call.fail(str(status_of(error)))
                yield write_event("error", error_body("/v1", error))

    async def _partial(
        self, model: Model, asked: ImagesRequest, step: Step, number: int, created: int, names: EventNames
    ) -> bytes:
        """The event of a preview, which is as large as the image."""
        threads, wanted = self._requests.threads, asked.request
        picture = await threads.run(enlarge, step.picture, model.components.spec.latent_factor)
        (file,) = await threads.encode_files([picture], wanted.format, wanted.quality)
        height, width, _ = picture.shape
        return write_partial(step, number, file, f"{width}x{height}", wanted.format, created, names)

    async def _written(self, write: Any, reply: Reply, *arguments: Any) -> bytes:
        if sum(map(len, reply.files)) > _LARGE_BYTES:
            return await self._requests.threads.run(write, reply, *arguments)
        written: bytes = write(reply, *arguments)
        return written
