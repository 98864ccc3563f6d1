"""The bundle behind Triton, through pytriton: Triton's own dynamic batches of requests, PNG over gRPC."""

import os

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.peers.pipeline import Pipeline, parse_peer_options


def main() -> None:
    options, others = parse_peer_options(), os.sched_getaffinity(0)
    pipeline = Pipeline(options)
    os.sched_setaffinity(0, others)  # Triton's own process inherits these

    @batch  # type: ignore[untyped-decorator]
    def infer(PROMPT: np.ndarray, STEPS: np.ndarray, SEED: np.ndarray) -> dict[str, np.ndarray]:  # noqa: N803 - Triton's names
        requests = [(p.decode(), int(n), int(s)) for (p,), (n,), (s,) in zip(PROMPT, STEPS, SEED, strict=True)]
        return {"IMAGE": np.array([[png] for png in pipeline(requests)], dtype=np.object_)}

    config = TritonConfig(
        grpc_address="127.0.0.1",
        grpc_port=options.port,
        http_address="127.0.0.1",
        http_port=options.port + 1,
        allow_metrics=False,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="images",
            infer_func=infer,
            inputs=[
                Tensor(name="PROMPT", dtype=bytes, shape=(1,)),
                Tensor(name="STEPS", dtype=np.int32, shape=(1,)),
                Tensor(name="SEED", dtype=np.uint64, shape=(1,)),
            ],
            outputs=[Tensor(name="IMAGE", dtype=bytes, shape=(1,))],
            config=ModelConfig(max_batch_size=pipeline.max_batch, batcher=DynamicBatcher()),
        )
        triton.serve()


if __name__ == "__main__":
    main()
