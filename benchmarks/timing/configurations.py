"""Configurations, the ways to make images that are timed, and the interleaved runs that time them by stage."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from benchmarks.measurements import Measurement, stage_measurement
from flashdiff.components import Components
from flashdiff.generate import finish_rows, prepare, unconditional_of
from flashdiff.rows import denoise_rows, start_rows
from flashdiff.server.client import Client
from flashdiff.server.images import encode_image
from flashdiff.tasks import check_order

STAGES = ("text", "denoise_step", "decode", "image_encoding", "queue", "wire", "total")
PROMPT = "a green monster"  # short, so that it fits any model; every model pads it to the same length

StageTimes = dict[str, list[float]]
"""Milliseconds of every call of a stage, by stage, in one run."""

T = TypeVar("T")


@dataclass(frozen=True)
class Configuration:
    """One way to make `batch` images with one number of steps."""

    model: str
    backend: str
    precision: str
    steps: int
    batch: int
    nfe: int
    """Network evaluations per image."""
    run_once: Callable[[int], StageTimes]
    """Makes the images of a seed."""


Samples = Mapping[tuple[Configuration, str], list[float]]
"""Milliseconds by configuration and stage."""


def time_configurations(configurations: Sequence[Configuration], repeats: int, report: Callable[[str], None]) -> Samples:
    """Run every configuration in turn, `repeats` times.

    Each turn runs the configuration twice and keeps the second run's times: the first one takes caches and cores back from the
    engine before it, whose idle threads spin for a while.
    """
    samples: dict[tuple[Configuration, str], list[float]] = defaultdict(list)
    for index in range(repeats):
        for configuration in configurations:
            configuration.run_once(index)
            for stage, times in configuration.run_once(index).items():
                samples[configuration, stage] += times
        if (index + 1) % max(1, repeats // 4) == 0:
            report(f"round {index + 1} of {repeats}")
    return samples


def stage_measurements(configurations: Sequence[Configuration], samples: Samples) -> list[Measurement]:
    """A measurement per configuration and stage."""
    return [
        stage_measurement(
            samples[c, stage],
            model=c.model,
            backend=c.backend,
            precision=c.precision,
            batch=c.batch,
            steps=c.steps,
            nfe=c.nfe,
            stage=stage,
        )
        for c in configurations
        for stage in STAGES
        if (c, stage) in samples
    ]


def in_process(model: str, engine: Components, steps: int, batch: int, backend: str, precision: str) -> Configuration:
    """The engine in this process, with the times of its stages."""
    unconditional = unconditional_of(engine)  # the empty prompt's: a server encodes it once, so no request includes it

    def run_once(seed: int) -> StageTimes:
        times: StageTimes = defaultdict(list)

        def timed(stage: str, work: Callable[[], T]) -> T:
            started = time.perf_counter()
            result = work()
            times[stage].append(_ms_since(started))
            return result

        order = check_order(engine.spec, prompt=PROMPT, seed=seed, steps=steps, count=batch)
        started = time.perf_counter()
        conditioning = timed("text", lambda: prepare(engine, engine.spec.text_part.name, [order.prompt])[0])
        rows = start_rows(engine.spec, order, {"prompt": conditioning}, unconditional)
        for _ in range(order.steps):
            timed("denoise_step", lambda: denoise_rows(engine, rows))
        images = timed("decode", lambda: finish_rows(engine, rows))
        timed("image_encoding", lambda: [encode_image(image, "png") for image in images])
        times["total"].append(_ms_since(started))
        return times

    nfe = steps * engine.spec.sampler.evaluations_per_step
    return Configuration(model, backend, precision, steps, batch, nfe, run_once)


def behind_server(client: Client, steps: int, batch: int, backend: str, precision: str) -> Configuration:
    """The student behind its server: the server's own times, and the rest of the client's latency as `wire`.

    Every prompt is new, so the server's cache of text embeddings does not help.
    """

    def run_once(seed: int) -> StageTimes:
        prompt = f"{PROMPT} {time.perf_counter_ns()}"
        started = time.perf_counter()
        result = client.generate(prompt, seed=seed, steps=steps, count=batch)
        total = _ms_since(started)
        server = dict(result.timings)
        wire = total - server.pop("total")
        step = server.pop("denoise") / steps
        return {**{stage: [ms] for stage, ms in server.items()}, "denoise_step": [step], "wire": [wire], "total": [total]}

    return Configuration("student, served", backend, precision, steps, batch, steps, run_once)


def whole_pipeline(
    model: str, precision: str, steps: int, batch: int, nfe: int, make_images: Callable[[int], Any]
) -> Configuration:
    """A torch pipeline whose stages are unknown, from prompt to PNG bytes; `make_images` gives floats of 0 to 1 from a seed."""

    def run_once(seed: int) -> StageTimes:
        started = time.perf_counter()
        for image in make_images(seed):
            encode_image((image * 255).round().astype("uint8"), "png")
        return {"total": [_ms_since(started)]}

    return Configuration(model, "torch", precision, steps, batch, nfe, run_once)


def _ms_since(started: float) -> float:
    return 1000 * (time.perf_counter() - started)
