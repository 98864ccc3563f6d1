"""Real Triton with a model of flashdiff's tensors, for `compare.py`; runs in an environment of its own (see the Makefile)."""

import sys

import numpy as np
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig, TritonSecurityConfig

_OPTIONAL = {
    "NEGATIVE_PROMPT": bytes,
    "SEED": np.uint64,
    "STEPS": np.int32,
    "WIDTH": np.int32,
    "HEIGHT": np.int32,
    "COUNT": np.int32,
    "FORMAT": bytes,
    "IMAGE": bytes,
    "STRENGTH": np.float32,
}


def infer(requests):
    answers = []
    for request in requests:
        width, height, count = (
            int(request[n][0]) if n in request else d for n, d in (("WIDTH", 64), ("HEIGHT", 64), ("COUNT", 1))
        )
        seed = int(request["SEED"][0]) if "SEED" in request else 0
        answers.append(
            {
                "IMAGES": np.zeros((count, height, width, 3), np.uint8),
                "ENCODED": np.array([b"file"] * count),
                "SEEDS": np.array([seed + i for i in range(count)], np.uint64),
            }
        )
    return answers


def main() -> None:
    with Triton(
        config=TritonConfig(grpc_port=int(sys.argv[1]), http_port=int(sys.argv[2]), metrics_port=int(sys.argv[3]), log_verbose=0),
        security_config=TritonSecurityConfig(restricted_endpoints=[]),  # or regions and the repository would ask for a token
    ) as triton:
        triton.bind(
            model_name="fake",
            infer_func=infer,
            inputs=[
                Tensor(name="PROMPT", dtype=bytes, shape=(1,)),
                *(Tensor(name=name, dtype=dtype, shape=(1,), optional=True) for name, dtype in _OPTIONAL.items()),
            ],
            outputs=[
                Tensor(name="IMAGES", dtype=np.uint8, shape=(-1, -1, -1, 3)),
                Tensor(name="ENCODED", dtype=bytes, shape=(-1,)),
                Tensor(name="SEEDS", dtype=np.uint64, shape=(-1,)),
            ],
            config=ModelConfig(batching=False),
        )
        triton.serve()


if __name__ == "__main__":
    main()
