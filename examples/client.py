"""Images from a running server, with flashdiff's own client: one with previews, then several at once.

flashdiff serve bundle
python examples/client.py "a green monster with horns" --server 127.0.0.1:50051 --out images
"""

import argparse
import asyncio
import sys
from pathlib import Path

from flashdiff.server.client import AsyncClient, Client, ServerError
from flashdiff.server.replies import Preview


def with_previews(address: str, prompt: str, out: Path) -> None:
    """Blocking: every preview as it comes, then the image."""
    with Client(address) as client:
        for update in client.stream(prompt, seed=7, timeout_s=10.0):
            if isinstance(update, Preview):
                print(f"step {update.step} of {update.steps}")
                (out / f"preview-{update.step}.png").write_bytes(update.png)
            else:
                (out / "image.png").write_bytes(update.images[0])
                print(f"seed {update.seeds[0]}, {update.timings['total']:.1f} ms in the server")


async def several(address: str, prompt: str, out: Path) -> None:
    """asyncio: four requests at once, which the server steps together; each has its own deadline and its own end."""

    async def one(client: AsyncClient, steps: int) -> str:
        try:
            result = await client.generate(prompt, steps=steps, seed=7, timeout_s=2.0)
        except ServerError as error:  # too late, no room, a wrong argument: the status says which
            return f"{steps} steps: {error}"
        (out / f"{steps}-steps.png").write_bytes(result.images[0])
        return f"{steps} steps: batches of {list(result.denoise_batches)}"

    async with AsyncClient(address) as client:
        for line in await asyncio.gather(*(one(client, steps) for steps in (1, 2, 3, 4))):
            print(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--server", default="127.0.0.1:50051", metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("images"), metavar="FOLDER", help="default: %(default)s")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with_previews(options.server, options.prompt, options.out)
        asyncio.run(several(options.server, options.prompt, options.out))
    except ServerError as error:
        print(f"client.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
