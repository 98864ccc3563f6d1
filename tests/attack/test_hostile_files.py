"""Whatever lies where a command expects a file, the answer is one line and exit status 2: no traceback, and no wait."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from attack_hostile import HOSTILE, NO_FILES, replace

from flashdiff import cli
from flashdiff.engines.bundle import MANIFEST, SCHEMA_VERSION, parse_manifest
from flashdiff.errors import BundleError, ConfigError
from flashdiff.lora_files import FLASH, WEIGHTS

# The limit is a guard: a pipe that is opened waits for ever.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> str:
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flashdiff: error: ")]
        assert (status, len(lines)) == (2, 1), (arguments, status, lines)
        return lines[0]

    return run


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_recipe(refused: Any, tmp_path: Path, kind: str) -> None:
    recipe = replace(tmp_path / "recipe.toml", kind)
    for command in ("distill", "build-engine"):
        refused(command, recipe, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 50_000,
        "a = " + "[" * 20_000 + "]" * 20_000,
        "x = " + "9" * 5000,
        "base = 1" + "0" * 4000,
        ".".join("a" * 5000) + " = 1",
        "base = 'avatars'\nbatch_size = 1000000000000",
        "base = '" + "x" * 100_000 + "'\nsizes = 7",
        "base = 'avatars'\nloras = [['a', nan]]",
        "base = 'avatars'\nsizes = [[1000000, 1000000]]",
        "base = 'avatars'\nsizes = [[0, 0]]",
        "base = 'avatars'\nbatch_sizes = [0]",
        "base = 'avatars'\nguidance = inf",
    ],
    ids=lambda text: text[:24],
)
def test_a_recipe_of_a_build_beyond_all_bounds(refused: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    refused("build-engine", tmp_path / "recipe.toml", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("", "batch_size", "0"),
        ("", "batch_size", "1_000_000_000"),
        ("", "seed", "-1"),
        ("", "guidance", "[1.0, 1e9]"),
        ("", "guidance", "[nan, nan]"),
        ("", "learning_rate", "inf"),
        ("", "accumulate", "0"),
        ("", "checkpoint_every", "0"),
        ("", "target_uses", "1_000_000"),
        ("grid", "num_train_timesteps", "1_000_000_000"),
        ("grid", "solver_steps", "0"),
        ("grid", "modes", "1_000_000"),
        ("lora", "rank", "1_000_000_000"),
        ("lora", "alpha", "inf"),
        ("data", "images", "1_000_000_000_000"),
    ],
)
def test_a_recipe_of_a_training_beyond_all_bounds(refused: Any, tmp_path: Path, table: str, key: str, value: str) -> None:
    keys = {
        "": {"base": "'avatars'", "guidance": "[2.0, 4.0]", "batch_size": "2", "learning_rate": "1e-3"},
        "data": {"source": "'avatars'"},
        "grid": {"solver_steps": "4"},
        "lora": {"rank": "2", "alpha": "2"},
    }
    keys[table][key] = value
    lines = [f"[{name}]" * bool(name) + "".join(f"\n{k} = {v}" for k, v in values.items()) for name, values in keys.items()]
    phase = "[[phases]]\nupdates = 4\nmode_weights = [1, 1, 1, 1]"
    (tmp_path / "recipe.toml").write_text("\n".join([*lines, phase]))
    assert key in refused("distill", tmp_path / "recipe.toml", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def copies(tiny_base: Path, flash_lora: Path, student_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a LoRA and a bundle to spoil one file of at a time."""
    place = tmp_path_factory.mktemp("copies")
    shutil.copytree(tiny_base, place / "base")
    shutil.copytree(flash_lora, place / "lora", ignore=shutil.ignore_patterns("training"))
    shutil.copytree(student_bundle, place / "bundle")
    return place


@pytest.fixture
def spoiled(copies: Path) -> Any:
    """Puts a hostile file in the place of another, for one test."""
    kept: list[tuple[Path, Path]] = []

    def spoil(name: str, kind: str) -> None:
        path, aside = copies / name, copies / "aside"
        path.rename(aside)
        kept.append((path, aside))
        replace(path, kind)

    yield spoil
    for path, aside in kept:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        aside.rename(path)


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize(
    "name",
    ["model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"],
)
def test_a_file_of_a_base(refused: Any, copies: Path, spoiled: Any, tmp_path: Path, name: str, kind: str) -> None:
    spoiled(f"base/{name}", kind)
    refused("build-engine", copies / "base", "--out", tmp_path / "out", "--dry-run")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("unet", {"layers_per_block": 10**9}),
        ("unet", {"block_out_channels": []}),
        ("unet", {"block_out_channels": [32] * 5000}),
        ("unet", {"block_out_channels": 7}),
        ("unet", {"in_channels": "four"}),
        ("unet", {"sample_size": 10**9}),
        ("unet", {"sample_size": None}),
        ("vae", {"latent_channels": 10**30}),
        ("vae", {"latent_channels": 0}),
        ("vae", {"block_out_channels": None}),
    ],
    ids=str,
)
def test_a_configuration_beyond_all_bounds(
    refused: Any, copies: Path, spoiled: Any, tmp_path: Path, name: str, change: dict[str, Any]
) -> None:
    config = json.loads((copies / "base" / name / "config.json").read_text())
    spoiled(f"base/{name}/config.json", "missing")
    (copies / "base" / name / "config.json").write_text(json.dumps(config | change))
    refused("build-engine", copies / "base", "--out", tmp_path / "out", "--dry-run")


@pytest.mark.parametrize("change", [{"num_train_timesteps": 10**9}, {"num_train_timesteps": 0}, {"beta_start": 7}], ids=str)
def test_a_schedule_beyond_all_bounds(refused: Any, copies: Path, spoiled: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    name = "base/scheduler/scheduler_config.json"
    config = json.loads((copies / name).read_text())
    spoiled(name, "missing")
    (copies / name).write_text(json.dumps(config | change))
    refused("build-engine", copies / "base", "--out", tmp_path / "out", "--dry-run")


@pytest.mark.parametrize("kind", [*NO_FILES, "empty", "noise", "deep", "header of a terabyte"])
def test_the_weights_of_a_base(refused: Any, copies: Path, spoiled: Any, tmp_path: Path, kind: str) -> None:
    spoiled("base/unet/diffusion_pytorch_model.safetensors", kind)
    refused("build-engine", copies / "base", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind != "missing"])
def test_the_flash_json_of_a_lora(refused: Any, copies: Path, spoiled: Any, tmp_path: Path, kind: str) -> None:
    if kind in ("link loop", "dangling link"):
        pytest.skip("as if it were not there: an ordinary LoRA")
    spoiled(f"lora/{FLASH}", kind)
    refused("build-engine", copies / "base", "--lora", copies / "lora", "--out", tmp_path / "out", "--dry-run")


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_weights_of_a_lora(refused: Any, copies: Path, spoiled: Any, tmp_path: Path, kind: str) -> None:
    spoiled(f"lora/{WEIGHTS}", kind)
    refused("build-engine", copies / "base", "--lora", copies / "lora", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", [MANIFEST, "tokenizers/input_ids.json", "denoiser/model.bin", "denoiser/model.xml"])
def test_a_file_of_a_bundle(refused: Any, copies: Path, spoiled: Any, tmp_path: Path, name: str, kind: str) -> None:
    spoiled(f"bundle/{name}", kind)
    for command in (("inspect", copies / "bundle"), ("generate", copies / "bundle", "a dog", "-o", tmp_path / "x.png")):
        refused(*command)
    refused("serve", copies / "bundle", "--port", 0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("batch_sizes", [0]),
        ("batch_sizes", [4, 2]),
        ("batch_sizes", [10**9]),
        ("sizes", []),
        ("sizes", [[10**6, 10**6]]),
        ("model.sizes", [[10**6, 10**6]]),
        ("model.sizes", [[16384, 16384]]),
        ("model.latent_channels", 10**9),
        ("model.latent_factor", 0),
        ("model.tokenizers.0.length", 10**9),
        ("model.tokenizers.0.pad_id", -1),
        ("model.sampler.schedule.num_train_timesteps", 10**9),
        ("model.sampler.grid.solver_steps", 10**9),
        ("model.sampler.default_steps", 10**9),
        ("model.parts", []),
        ("model.parts.0.inputs", ["unknown"]),
        ("model.parts.3.phase", "prepare"),
        ("parts.denoiser.inputs.0.shape", [10**9, 10**9]),
        ("parts.denoiser.inputs.0.shape", ["unknown"]),
        ("parts.denoiser.inputs.0.shape", [2**20, 2**20]),
        ("parts.text_encoder.outputs.0.shape", ["batch", "height"]),
        ("parts.denoiser.files", []),
        ("latent_codec.scale", "much"),
        ("files", {"a\0b": "0"}),
    ],
    ids=str,
)
def test_a_manifest_beyond_all_bounds(refused: Any, copies: Path, spoiled: Any, path: str, value: object) -> None:
    text, _ = parse_manifest(copies / "bundle")
    values: Any = json.loads(text)
    *way, last = path.split(".")
    place = values
    for step in way:
        place = place[int(step) if isinstance(place, list) else step]
    place[last] = value
    spoiled(f"bundle/{MANIFEST}", "missing")
    (copies / "bundle" / MANIFEST).write_text(json.dumps(values))
    assert "is damaged" in refused("inspect", copies / "bundle")


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_image_of_a_request(refused: Any, copies: Path, tmp_path: Path, kind: str) -> None:
    image = replace(tmp_path / "image.png", kind)
    refused("generate", copies / "bundle", "a dog", "-o", tmp_path / "x.png", "--image", image)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("kind", [*NO_FILES, "empty", "not UTF-8"])
def test_a_file_of_prompts(refused: Any, tmp_path: Path, kind: str) -> None:
    prompts = replace(tmp_path / "prompts.txt", kind)
    (tmp_path / "real").mkdir()
    refused("evaluate", "avatars", "--features", "avatars", "--reference", tmp_path / "real", "--prompts", prompts)


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind not in ("missing", "link loop", "dangling link")])
@pytest.mark.parametrize("name", ["images/metadata.jsonl", "images/a.png", "shards/a.tar"])
def test_images_to_evaluate(refused: Any, tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    path.parent.mkdir()
    if name.endswith(".jsonl") and kind == "empty":
        pytest.skip("no lines are no mistake")
    replace(path, kind)
    refused("evaluate", path.parent, "--features", "avatars", "--reference", path.parent)


@pytest.mark.parametrize("size", [2**62, 1 << 40, (1 << 30) + 1])
def test_a_shard_with_a_member_beyond_all_bounds(refused: Any, tmp_path: Path, size: int) -> None:
    member = tarfile.TarInfo("a.png")
    member.size = size
    (tmp_path / "a.tar").write_bytes(member.tobuf(format=tarfile.GNU_FORMAT))
    refused("evaluate", tmp_path, "--features", "avatars", "--reference", tmp_path)


def test_numbers_of_images_beyond_all_bounds(refused: Any) -> None:
    for option in ("--count", "--seeds", "--reference-count"):
        assert "at most" in refused("evaluate", "avatars", option, 10**12)


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind != "huge integer"])  # which is a name and a token
def test_tokens_and_certificates(tmp_path: Path, kind: str) -> None:
    from flashdiff.server.auth import Tokens
    from flashdiff.server.certificates import certificates

    file = replace(tmp_path / "file", kind)
    with pytest.raises(ConfigError):
        Tokens(file)
    with pytest.raises(ConfigError):
        certificates(file, file, None)


@pytest.fixture(scope="module")
def started(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training's folder, as its recipe, to spoil checkpoints and data of."""
    from recipes import tiny_recipe

    from flashdiff.distill.loop import distill

    place = tmp_path_factory.mktemp("started")
    recipe = tiny_recipe(tiny_base)
    distill(recipe, place / "out")
    (place / "out" / FLASH).unlink()  # as if it had been killed while it published
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict) and key != "phases"]
    for name, table in values.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    for phase in values["phases"]:
        lines += ["[[phases]]", *(f"{key} = {json.dumps(value)}" for key, value in phase.items())]
    (place / "recipe.toml").write_text("\n".join(lines))
    return place


_OF_A_RUN = ["checkpoints/000004.pt", "recipe.json"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind not in ("missing", "dangling link", "link loop")])
@pytest.mark.parametrize("name", _OF_A_RUN)
def test_a_file_of_a_run_to_resume(refused: Any, started: Path, tmp_path: Path, name: str, kind: str) -> None:
    out = Path(shutil.copytree(started / "out", tmp_path / "out"))
    path = out / "training" / name
    replace(path, kind)
    refused("distill", started / "recipe.toml", "--out", out)


@pytest.mark.slow
def test_a_checkpoint_of_something_else(refused: Any, started: Path, tmp_path: Path) -> None:
    import torch

    out = Path(shutil.copytree(started / "out", tmp_path / "out"))
    for state in ({}, {"student": {}}, {"student": {"update": -1}}, [1], torch.zeros(3)):
        torch.save(state, out / "training" / "checkpoints" / "000004.pt")
        assert "checkpoint" in refused("distill", started / "recipe.toml", "--out", out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind not in ("missing", "dangling link", "link loop", "folder")])
@pytest.mark.parametrize("name", ["a.png", "a.tar", "a.parquet", "metadata.jsonl"])
def test_data_to_train_on(refused: Any, started: Path, tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "data").mkdir()
    replace(tmp_path / "data" / name, kind)
    (tmp_path / "data" / "a.txt").write_text("a caption")
    recipe = (
        (started / "recipe.toml")
        .read_text()
        .replace(
            next(line for line in (started / "recipe.toml").read_text().splitlines() if line.startswith("source")),
            f"source = {json.dumps(str(tmp_path / 'data'))}",
        )
    )
    (tmp_path / "recipe.toml").write_text(recipe)
    refused("distill", tmp_path / "recipe.toml", "--out", tmp_path / "out")


def test_a_schema_that_is_no_number_is_refused(copies: Path, spoiled: Any) -> None:
    spoiled(f"bundle/{MANIFEST}", "missing")
    for version in ([], {}, "5", None, -1, 5.5, True, 10**4000):
        (copies / "bundle" / MANIFEST).write_text(json.dumps({"schema_version": version}))
        with pytest.raises(BundleError):
            parse_manifest(copies / "bundle")
    (copies / "bundle" / MANIFEST).write_text(json.dumps({"schema_version": SCHEMA_VERSION}))
    with pytest.raises(BundleError):
        parse_manifest(copies / "bundle")


def test_an_image_of_a_billion_pixels_is_no_image(refused: Any, copies: Path, tmp_path: Path) -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("1", (1, 1)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    (tmp_path / "a.png").write_bytes(content)
    refused("generate", copies / "bundle", "a dog", "-o", tmp_path / "x.png", "--image", tmp_path / "a.png")
    refused("evaluate", tmp_path, "--features", "avatars", "--reference", tmp_path)
