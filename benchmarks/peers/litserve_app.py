"""The bundle behind LitServe, as its documentation serves a model: dynamic batches of requests, PNG over HTTP."""

from typing import Any

import litserve
from fastapi import Response

from benchmarks.peers.pipeline import PeerOptions, Pipeline, parse_peer_options
from flashdiff.engines.bundle import read_manifest


class ImageAPI(litserve.LitAPI):  # type: ignore[misc]
    """LitServe calls `setup` in the process that runs the model."""

    def __init__(self, options: PeerOptions) -> None:
        # A batch is whatever waits when the previous one ends, so there is no timeout to tune.
        super().__init__(max_batch_size=read_manifest(options.bundle).batch_sizes[-1], batch_timeout=0.0)
        self._options = options

    def setup(self, device: str) -> None:
        self._pipeline = Pipeline(self._options)

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
    options = parse_peer_options()
    server = litserve.LitServer(ImageAPI(options), accelerator="cpu", devices=1, fast_queue=True)
    server.run(host="127.0.0.1", port=options.port, log_level="warning", generate_client_file=False)
