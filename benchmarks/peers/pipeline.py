"""The pipeline that a peer serves: a batch of requests in, their PNG files out. It imports only what a bundle needs to run."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.traffic.batch_sizes import largest_filled
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.generate import generate
from flashdiff.server.images import encode_image
from flashdiff.tasks import check_order


@dataclass(frozen=True)
class PeerOptions:
    """A peer's command line: what it serves, and where."""

    bundle: Path
    port: int
    cores: frozenset[int]
    """The engine's cores; the rest of the peer runs on those that it was started on."""


def parse_peer_options() -> PeerOptions:
    """Read the command line, which is the same for every peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cores", required=True, help="0,1,...")
    options = parser.parse_args()
    return PeerOptions(options.bundle, options.port, frozenset(map(int, options.cores.split(","))))


class Pipeline:
    """The opened bundle. Threads that open or call it move to the engine's cores."""

    def __init__(self, options: PeerOptions) -> None:
        self._cores = options.cores
        os.sched_setaffinity(0, self._cores)
        self._engine = open_bundle(options.bundle)
        self._engine.measure_costs()  # warms up every batch size, as our server does
        slots = self._engine.spec.sampler.evaluations_per_step
        self._sizes = [batch // slots for batch in self._engine.manifest.batch_sizes if batch >= slots]
        self.max_batch = self._sizes[-1]

    def __call__(self, requests: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """The PNG files of (prompt, steps, seed), once all are made.

        Batches have no padding: five rows run as four and one, since padded to eight they would cost as much as eight.
        """
        os.sched_setaffinity(0, self._cores)
        orders = [check_order(self._engine.spec, prompt=prompt, steps=steps, seed=seed) for prompt, steps, seed in requests]
        made = []
        while orders:
            count = largest_filled(len(orders), self._sizes)
            made += generate(self._engine, orders[:count])
            orders = orders[count:]
        return [encode_image(images[0], "png") for images in made]
