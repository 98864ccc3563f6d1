"""OpenVINO GenAI's text-to-image pipeline, driven by lines of JSON; runs in an environment of its own, without flashdiff.

Each line {"seed": ..., "steps": ...} on stdin makes one image; the answer {"ms": ...} is the time from prompt to PNG bytes.
"""

import argparse
import json
import sys
import time
from io import BytesIO

import openvino_genai
from PIL import Image

_HINTS = {"fp32": "f32", "bf16": "bf16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--precision", choices=_HINTS, required=True)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--prompt", required=True)
    options = parser.parse_args()

    pipeline = openvino_genai.Text2ImagePipeline(options.model)
    scheduler = f"{options.model}/scheduler/scheduler_config.json"
    pipeline.set_scheduler(openvino_genai.Scheduler.from_config(scheduler, openvino_genai.Scheduler.Type.LCM))
    pipeline.reshape(1, options.side, options.side, 1.0)
    pipeline.compile("CPU", INFERENCE_PRECISION_HINT=_HINTS[options.precision])
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        image = pipeline.generate(
            options.prompt,
            width=options.side,
            height=options.side,
            num_inference_steps=asked["steps"],
            guidance_scale=1.0,
            rng_seed=asked["seed"],
        )
        Image.fromarray(image.data[0]).save(BytesIO(), "png")
        print(json.dumps({"ms": 1000 * (time.perf_counter() - started)}), flush=True)


if __name__ == "__main__":
    main()
