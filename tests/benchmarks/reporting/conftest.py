"""A made-up result file of every benchmark that the report has a section for."""

from pathlib import Path

import pytest
from measured import estimate, timed, write_result


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    stages = {"text": 1.0, "decode": 1.0, "image_encoding": 0.1}
    latency = [
        *timed("student", 4, 4, 20.0, denoise_step=4.0, **stages),
        *timed("student, served", 4, 4, 25.0, denoise_step=4.0, queue=1.0, wire=2.0, **stages),
        *timed("diffusers", 4, 4, 90.0),
        *timed("teacher", 50, 100, 400.0, denoise_step=8.0, **stages),
    ]
    open_loop = [
        {
            "phase": "open loop",
            "batching": batching,
            "load": load,
            "sent": 10,
            "statuses": {"OK": 9},
            "p50_ms": 20,
            "p95_ms": 30,
            "p99_ms": 40,
        }
        for load in (0.5, 0.8)
        for batching in ("step", "request")
    ]
    load = [
        {"phase": "offline", "images_per_s": 100, "cores": "own"},
        {"phase": "quiet", "idle_cores": "asleep", "p50_ms": 20, "p50_beyond_engine_ms": 2},
        {"phase": "saturated", "goodput_per_s": 90, "cores": "own", "of_offline": 100},
        *open_loop,
        {"phase": "overload", "seconds": 60, "goodput_per_s": 85, "refusal_p99_ms": 5, "memory_mb": [70, 90, 91]},
        {"phase": "chaos", "answered": 10, "accepted": 10, "sent": 10, "slots_left": 0},
    ]
    measures = {name: estimate(20.0) for name in ("fid", "kid", "text", "diversity")}
    measures |= {"large": estimate(0.9), "small": estimate(0.7)}
    quality = {
        "points": [
            {"model": model, "steps": steps, "median_ms": ms, **measures, "kid": estimate(kid)}
            for model, steps, ms, kid in (("student", 4, 20.0, 20.0), ("teacher", 50, 400.0, 10.0))
        ]
    }
    scaling = [
        {"parameters": parameters, "size": [side, side], "batch": batch, "median_ms": 2.0, "samples_ms": [2.0, 2.0]}
        for parameters in (10**6, 4 * 10**6)
        for side in (64, 128)
        for batch in (1, 8)
    ]
    return [
        write_result(tmp_path, "latency.json", rows=latency),
        write_result(tmp_path, "load.json", rows=load),
        write_result(tmp_path, "quality.json", real={**measures, "kid": estimate(1.0)}, **quality),
        write_result(tmp_path, "peers.json", rows=[{**one, "server": "LitServe", "goodput_per_s": 9.0} for one in open_loop]),
        write_result(tmp_path, "scaling.json", rows=scaling),
    ]
