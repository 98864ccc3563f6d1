"""The pipeline that peers serve."""

import os
from pathlib import Path

from benchmarks.peers.pipeline import PeerOptions, Pipeline


def test_three_requests_run_as_two_and_one_without_padding(student_bundle: Path) -> None:
    pipeline = Pipeline(PeerOptions(student_bundle, 0, frozenset(os.sched_getaffinity(0))))
    rows: list[int] = []
    call = pipeline._engine.call

    def counted(part, inputs):
        if part == "denoiser":
            rows.append(len(inputs["latents"]))
        return call(part, inputs)

    pipeline._engine.call = counted
    requests = [(f"a dog {seed}", 2, seed) for seed in range(3)]
    together = pipeline(requests)
    assert rows == [2, 2, 1, 1]
    assert together == [png for request in requests for png in pipeline([request])]
