"""Every parser, fuzzed from a valid file: it takes what it is given, or raises its own error, and nothing else.

Small and the same every time; `FLASHDIFF_FUZZ=10000` tries that many variants of each file.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flashdiff.config import load_recipe
from flashdiff.distill.config import Recipe, bundled_recipe
from flashdiff.engines.bundle import MANIFEST, parse_manifest
from flashdiff.engines.config import BuildRecipe, parse_batches, parse_sizes
from flashdiff.errors import FlashdiffError
from flashdiff.lora import read_flash_info
from flashdiff.lora_files import FLASH, WEIGHTS

_FUZZ = settings(
    max_examples=int(os.environ.get("FLASHDIFF_FUZZ", "60")),
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
_VALUES: list[Any] = [
    None, True, -1, 0, 1, 10**6, 10**9, 2**63, 10**400, 1e300, -0.5, "", "x", "\x00", "\u2028", "../x", [], {}, [[]], [None],
    ["x"] * 100, {"x": {}}, "9" * 5000,
]  # fmt: skip
_PIECES = [
    b"",
    b"\x00",
    b"\xff",
    b"{",
    b"}",
    b"[" * 3000,
    b'"',
    b"-",
    b"1e999",
    b"9" * 5000,
    b"\n",
    b"null",
    b"nan",
    b"\xed\xa0\x80",
]


def _spliced(seed: bytes, places: list[tuple[float, int, bytes]]) -> bytes:
    """The bytes with a few stretches replaced; `places` are (where, as a share of the length; how many bytes; by what)."""
    for where, length, piece in places:
        start = int(where * len(seed))
        seed = seed[:start] + piece + seed[start + length :]
    return seed


_SPLICES = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from([0, 1, 2, 8, 100, 10**9]), st.sampled_from(_PIECES)), min_size=1, max_size=3
)


def _leaves(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(leaf for key, item in inner for leaf in _leaves(item, (*way, key)))]


def _with_value(text: bytes, which: float, value: Any) -> bytes:
    """JSON with one of its values, at any depth, replaced by another."""
    root = [json.loads(text)]
    ways = _leaves(root)[1:]
    *way, last = ways[int(which * (len(ways) - 1))]
    place: Any = root
    for key in way:
        place = place[key]
    place[last] = value
    return json.dumps(root[0]).encode()


def _takes_or_refuses(parse: Callable[[], object]) -> None:
    with suppress(FlashdiffError):
        parse()


def _bundle_file(bundle: Path, name: str) -> bytes:
    return (bundle / name).read_bytes()


@pytest.mark.parametrize(("record", "source"), [(Recipe, "avatars.toml"), (Recipe, "sd15.toml"), (BuildRecipe, "")])
@_FUZZ
@example(places=[(0.0, 10**9, b"a = " + b"[" * 5000)])
@example(places=[(1.0, 0, b"\nx = " + b"9" * 5000)])
@given(places=_SPLICES)
def test_recipes(tmp_path: Path, record: Any, source: str, places: list[tuple[float, int, bytes]]) -> None:
    seed = b"base = 'avatars'\nloras = [['avatars-flash', 1.0]]\nsizes = [[64, 64]]\nbatch_sizes = [1, 2]\n"
    file = tmp_path / "recipe.toml"
    file.write_bytes(_spliced(bundled_recipe(source).read_bytes() if source else seed, places))
    _takes_or_refuses(lambda: load_recipe(file, record))


@_FUZZ
@example(which=0.0, value=None, places=[])
@given(which=st.floats(0, 1), value=st.sampled_from(_VALUES), places=st.one_of(st.just([]), _SPLICES))
def test_manifests(
    student_bundle: Path, tmp_path: Path, which: float, value: Any, places: list[tuple[float, int, bytes]]
) -> None:
    text = _with_value(_bundle_file(student_bundle, MANIFEST), which, value)
    (tmp_path / MANIFEST).write_bytes(_spliced(text, places))
    _takes_or_refuses(lambda: parse_manifest(tmp_path))


@_FUZZ
@given(which=st.floats(0, 1), value=st.sampled_from(_VALUES))
def test_manifests_that_are_sealed_again(student_bundle: Path, which: float, value: Any) -> None:
    """A value that the manifest's record takes must also suit what reads it."""
    from pydantic import ValidationError

    from flashdiff.engines.bundle import Manifest
    from flashdiff.engines.shapes import bucket_shapes, dimensions_of

    try:
        manifest = Manifest.model_validate_json(_with_value(_bundle_file(student_bundle, MANIFEST), which, value))
    except ValidationError:
        return
    assert manifest.sealed().checksum
    for part in manifest.parts.values():
        for size in manifest.model.sizes if part.is_spatial else (None,):
            for shape in bucket_shapes((*part.inputs, *part.outputs), dimensions_of(manifest.model, size, 1)).values():
                assert all(side >= 0 for side in shape)
    assert manifest.model.text_part
    assert manifest.model.sampler.times(1)


@_FUZZ
@given(which=st.floats(0, 1), value=st.sampled_from(_VALUES), places=st.one_of(st.just([]), _SPLICES))
def test_tokenizers(student_bundle: Path, which: float, value: Any, places: list[tuple[float, int, bytes]]) -> None:
    from flashdiff.text import PromptTokenizer

    spec = parse_manifest(student_bundle)[1].model.tokenizers[0]
    text = _with_value(_bundle_file(student_bundle, "tokenizers/input_ids.json"), which, value)
    text = _spliced(text, places)
    _takes_or_refuses(lambda: PromptTokenizer({spec.name: text.decode("utf-8", "replace")}, [spec])(["a dog", "", "\x00"]))


@_FUZZ
@given(which=st.floats(0, 1), value=st.sampled_from(_VALUES), places=st.one_of(st.just([]), _SPLICES))
def test_flash_json(flash_lora: Path, tmp_path: Path, which: float, value: Any, places: list[tuple[float, int, bytes]]) -> None:
    (tmp_path / FLASH).write_bytes(_spliced(_with_value((flash_lora / FLASH).read_bytes(), which, value), places))
    _takes_or_refuses(lambda: read_flash_info(tmp_path))


@pytest.mark.parametrize("name", ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "model_index.json"])
@_FUZZ
@given(which=st.floats(0, 1), value=st.sampled_from(_VALUES))
def test_configurations_of_a_base(tiny_base: Path, tmp_path: Path, name: str, which: float, value: Any) -> None:
    from flashdiff.families import family_of
    from flashdiff.families.loading import size_limits

    base = tmp_path / "base"
    if not base.exists():
        base.mkdir()
        for folder in ("tokenizer", "unet", "vae", "scheduler"):
            (base / folder).mkdir()
            for file in (tiny_base / folder).glob("*.json"):
                (base / folder / file.name).write_bytes(file.read_bytes())
        (base / "model_index.json").write_bytes((tiny_base / "model_index.json").read_bytes())
    (base / name).write_bytes(_with_value((tiny_base / name).read_bytes(), which, value))

    def parse() -> None:
        family = family_of(base)
        family.read_spec(base)
        size_limits(base, family)

    _takes_or_refuses(parse)


@_FUZZ
@given(places=_SPLICES)
def test_weights_of_a_lora(flash_lora: Path, tiny_base: Path, tmp_path: Path, places: list[tuple[float, int, bytes]]) -> None:
    from flashdiff.lora import read_lora

    content = (flash_lora / WEIGHTS).read_bytes()
    header = int.from_bytes(content[:8], "little") + 8
    (tmp_path / WEIGHTS).write_bytes(_spliced(content[:header], places) + content[header:])
    family, model = _loaded(tiny_base)
    _takes_or_refuses(lambda: read_lora(tmp_path, model, family))


@cache
def _loaded(base: Path) -> Any:
    from flashdiff.families import load_base

    return load_base(str(base))


@_FUZZ
@example(places=[(0.0, 10**9, b'{"file_name": "a.png", "scene": ["moods", ' + b"9" * 5000 + b"]}")])
@given(places=_SPLICES)
def test_metadata(tmp_path: Path, places: list[tuple[float, int, bytes]]) -> None:
    from flashdiff.datasets import METADATA
    from flashdiff.evaluation.images import read_metadata

    seed = b'{"file_name": "a.png", "text": "a dog", "seed": 3}\n{"file_name": "b.png", "scene": ["moods", 7], "text": "b"}\n'
    (tmp_path / METADATA[0]).write_bytes(_spliced(seed, places))
    _takes_or_refuses(lambda: read_metadata(tmp_path))


def _shard() -> bytes:
    from PIL import Image

    buffer, picture = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(fileobj=buffer, mode="w") as shard:
        for name, content in (("0.png", picture.getvalue()), ("0.txt", b"a dog"), ("1.png", picture.getvalue())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@_FUZZ
@given(places=_SPLICES)
def test_shards(tmp_path: Path, places: list[tuple[float, int, bytes]]) -> None:
    from flashdiff.evaluation.images import read_images

    (tmp_path / "a.tar").write_bytes(_spliced(_shard()[:4096], places))
    _takes_or_refuses(lambda: read_images(tmp_path))


@_FUZZ
@given(places=_SPLICES)
def test_tokens_of_callers(tmp_path: Path, places: list[tuple[float, int, bytes]]) -> None:
    from flashdiff.server.auth import Tokens

    (tmp_path / "tokens").write_bytes(_spliced(b"# who\nalice 0123456789abcdef 5\nbob fedcba9876543210\n", places))
    _takes_or_refuses(lambda: Tokens(tmp_path / "tokens").admit("Bearer fedcba9876543210"))


@_FUZZ
@given(places=_SPLICES)
def test_checkpoints(tmp_path: Path, places: list[tuple[float, int, bytes]]) -> None:
    import torch

    from flashdiff.checkpoint import load_state

    buffer = io.BytesIO()
    torch.save({"step": 3, "weights": {"a": torch.zeros(3)}}, buffer)
    (tmp_path / "a.pt").write_bytes(_spliced(buffer.getvalue(), places))
    _takes_or_refuses(lambda: load_state(tmp_path / "a.pt"))


@_FUZZ
@example(text="9" * 5000)
@example(text="1" * 30 + "x" + "1" * 30)
@given(text=st.text("0123456789x,-. ", max_size=40))
def test_sizes_and_batches(text: str) -> None:
    _takes_or_refuses(lambda: parse_sizes(text))
    _takes_or_refuses(lambda: parse_batches(text))
