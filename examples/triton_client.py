"""The same from stock `tritonclient`, without a line of flashdiff: one image, then a stream with previews.

flashdiff serve bundle
python examples/triton_client.py bundle "a green monster with horns" --server 127.0.0.1:50051 --out images
"""

import argparse
import queue
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def inputs(prompt: str, steps: int, image_format: str) -> list[triton.InferInput]:
    """Each an array of one value; what is left out is the server's choice."""
    values = {
        "PROMPT": np.array([prompt.encode()], dtype=object),
        "STEPS": np.array([steps], dtype=np.int32),
        "SEED": np.array([7], dtype=np.uint64),
        "FORMAT": np.array([image_format.encode()], dtype=object),
    }
    types = {"PROMPT": "BYTES", "STEPS": "INT32", "SEED": "UINT64", "FORMAT": "BYTES"}
    made = []
    for name, value in values.items():
        made.append(triton.InferInput(name, [1], types[name]))
        made[-1].set_data_from_numpy(value)
    return made


def one(client: triton.InferenceServerClient, model: str, prompt: str, out: Path) -> None:
    """A file: ENCODED is as FORMAT says. IMAGES would be pixels."""
    wanted = [triton.InferRequestedOutput("ENCODED")]
    result = client.infer(model, inputs(prompt, 4, "jpeg"), outputs=wanted, client_timeout=10.0)
    (out / "image.jpg").write_bytes(result.as_numpy("ENCODED")[0])


def with_previews(client: triton.InferenceServerClient, model: str, prompt: str, out: Path) -> None:
    """A decoupled stream: a PREVIEW after every step, and the response that is final last."""
    answers: queue.Queue[tuple[triton.InferResult | None, InferenceServerException | None]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    wanted = [triton.InferRequestedOutput(name) for name in ("PREVIEW", "ENCODED")]
    client.async_stream_infer(model, inputs(prompt, 4, "png"), outputs=wanted)
    is_final = False
    while not is_final:
        result, error = answers.get(timeout=10)
        if result is None:
            raise error or InferenceServerException("neither result nor error")
        parameters = result.get_response().parameters
        is_final = parameters["triton_final_response"].bool_param
        if is_final:
            (out / "streamed.png").write_bytes(result.as_numpy("ENCODED")[0])
        else:
            print(f"step {parameters['step'].int64_param} of {parameters['total'].int64_param}", result.as_numpy("PREVIEW").shape)
    client.stop_stream()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="the folder of the bundle that is served")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--server", default="127.0.0.1:50051", metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("images"), metavar="FOLDER", help="default: %(default)s")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        client = triton.InferenceServerClient(options.server)
        one(client, options.model, options.prompt, options.out)
        with_previews(client, options.model, options.prompt, options.out)
        client.close()
    except InferenceServerException as error:
        print(f"triton_client.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
