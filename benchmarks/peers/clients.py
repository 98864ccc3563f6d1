"""Clients of the peers, with the interface that the loops of calls need: `generate`, which raises ServerError."""

import asyncio
from typing import Self

import grpc
import httpx2
import numpy as np
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from flashdiff.server.client import ServerError

_NUMPY_TYPES: dict[str, type[np.generic]] = {"BYTES": np.object_, "INT32": np.int32, "UINT64": np.uint64}


class LitServeClient:
    """LitServe over HTTP."""

    def __init__(self, address: str) -> None:
        limits = httpx2.Limits(max_connections=None)
        self._http = httpx2.AsyncClient(base_url=f"http://{address}", limits=limits, timeout=60, trust_env=False)

    async def generate(self, prompt: str, *, steps: int = 4, seed: int = 0, timeout_s: float | None = None) -> bytes:
        try:
            request = {"prompt": prompt, "steps": steps, "seed": seed}
            async with asyncio.timeout(timeout_s):
                answer = await self._http.post("/predict", json=request)
        except TimeoutError:
            raise ServerError(grpc.StatusCode.DEADLINE_EXCEEDED, None) from None
        except httpx2.HTTPError as error:
            raise ServerError(grpc.StatusCode.UNAVAILABLE, str(error)) from None
        if answer.status_code != 200:
            raise ServerError(grpc.StatusCode.UNKNOWN, answer.text)
        return bytes(answer.content)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()


class TritonClient:
    """Triton over gRPC, through NVIDIA's client."""

    def __init__(self, address: str) -> None:
        self._grpc = triton.InferenceServerClient(address)

    async def generate(self, prompt: str, *, steps: int = 4, seed: int = 0, timeout_s: float | None = None) -> bytes:
        inputs = []
        for name, kind, value in (("PROMPT", "BYTES", prompt.encode()), ("STEPS", "INT32", steps), ("SEED", "UINT64", seed)):
            values = np.array([[value]], dtype=_NUMPY_TYPES[kind])
            inputs.append(triton.InferInput(name, [1, 1], kind).set_data_from_numpy(values))
        try:
            answer = await self._grpc.infer("images", inputs, client_timeout=timeout_s)
        except InferenceServerException as error:
            name = (error.status() or "UNKNOWN").removeprefix("StatusCode.")
            raise ServerError(grpc.StatusCode[name], error.message()) from None
        return bytes(answer.as_numpy("IMAGE")[0, 0])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._grpc.close()
