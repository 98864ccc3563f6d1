"""What a peer serves: whole images of a bundle, a batch of requests in, their PNG files out. Needs no more than a bundle."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.generate import generate
from flashdiff.server.images import encode_image
from flashdiff.tasks import check_order


@dataclass(frozen=True)
class Place:
    """Where a peer runs."""

    bundle: Path
    port: int
    cores: frozenset[int]
    """The engine's; the rest of the peer runs where it was started."""


def parse_place() -> Place:
    """The command line that every peer has."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cores", required=True, help="0,1,...")
    options = parser.parse_args()
    return Place(options.bundle, options.port, frozenset(map(int, options.cores.split(","))))


def filled(rows: int, batch_sizes: Sequence[int]) -> int:
    """The largest of the rising batch sizes that so many rows fill, at least the smallest: no padding is paid for."""
    return max([size for size in batch_sizes if size <= rows], default=batch_sizes[0])


class Pipeline:
    """Opened on the engine's cores; the thread that calls it moves there too."""

    def __init__(self, place: Place) -> None:
        self._cores = place.cores
        os.sched_setaffinity(0, self._cores)
        self._engine = open_bundle(place.bundle)
        self._engine.measure_costs()  # makes every batch size ready, as our server does
        slots = self._engine.spec.sampler.evaluations_per_step
        self._sizes = [batch // slots for batch in self._engine.manifest.batch_sizes if batch >= slots]
        self.max_batch = self._sizes[-1]

    def __call__(self, requests: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """PNG files of (prompt, steps, seed), all of them when the slowest is done. They run in batches that they fill: five rows
        as four and one, where one padded batch would cost as much as eight."""
        os.sched_setaffinity(0, self._cores)
        orders = [check_order(self._engine.spec, prompt=prompt, steps=steps, seed=seed) for prompt, steps, seed in requests]
        made = []
        while orders:
            count = filled(len(orders), self._sizes)
            made += generate(self._engine, orders[:count])
            orders = orders[count:]
        return [encode_image(images[0], "png") for images in made]
