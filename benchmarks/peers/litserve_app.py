"""The bundle behind LitServe, as its documentation serves a model: dynamic batches of requests, PNG over HTTP."""

from typing import Any

import litserve
from fastapi import Response

from benchmarks.peers.pipeline import Pipeline, Place, parse_place
from flashdiff.engines.bundle import read_manifest


class ImageAPI(litserve.LitAPI):  # type: ignore[misc]
    """`setup` runs in the process that infers."""

    def __init__(self, place: Place) -> None:
        # A batch is what is waiting when the last one ends: no timeout to tune.
        super().__init__(max_batch_size=read_manifest(place.bundle).batch_sizes[-1], batch_timeout=0.0)
        self._place = place

    def setup(self, device: str) -> None:
        self._pipeline = Pipeline(self._place)

    def decode_request(self, request: dict[str, Any]) -> tuple[str, int, int]:
        return request["prompt"], request["steps"], request["seed"]

    def batch(self, inputs: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
        return inputs

    def predict(self, inputs: list[tuple[str, int, int]]) -> list[bytes]:
        return self._pipeline(inputs)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="image/png")


if __name__ == "__main__":
    place = parse_place()
    server = litserve.LitServer(ImageAPI(place), accelerator="cpu", devices=1, fast_queue=True)
    server.run(host="127.0.0.1", port=place.port, log_level="warning", generate_client_file=False)
