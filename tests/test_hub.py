"""Bases and LoRAs by their names on the hub: only what is loaded is downloaded, and each refusal says what to do."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub import COMMIT, Hub, running
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from flashdiff.errors import FlashdiffError
from flashdiff.families import find_base
from flashdiff.families.autoencoders import find_vae
from flashdiff.families.files import base_files
from flashdiff.families.hub import HubName, hub_name
from flashdiff.families.ip_adapter import find_adapter
from flashdiff.lora import find_lora, lora_name, read_flash_info
from flashdiff.lora_files import FLASH, KOHYA, WEIGHTS


@pytest.fixture(scope="module")
def hub(tiny_base: Path, flash_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    base = Path(shutil.copytree(tiny_base, folder / "base"))
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        weights = load_file(base / part / f"{stem}.safetensors")
        halves = {name: values.half() for name, values in weights.items()}
        save_file(halves, base / part / f"{stem}.fp16.safetensors", metadata={"format": "pt"})
        (base / part / f"{stem}.bin").write_bytes(b"never sent")
    (base / "README.md").write_text("a card")
    (base / "model.ckpt").write_bytes(b"never sent")
    styles = folder / "styles"
    styles.mkdir()
    for name in ("one", "other"):
        shutil.copy(flash_lora / WEIGHTS, styles / f"{name}.safetensors")
    flash = folder / "flash"
    shutil.copytree(flash_lora, flash, ignore=shutil.ignore_patterns("training"))
    adapters = folder / "adapters"
    (adapters / "models" / "image_encoder").mkdir(parents=True)
    for name in ("ip.safetensors", "ip.bin", "image_encoder/config.json", "image_encoder/model.safetensors"):
        (adapters / "models" / name).write_text(name)  # which is not read here
    repositories = {"owner/tiny": base, "owner/flash": flash, "owner/styles": styles, "owner/secret": flash, "owner/gated": base}
    repositories |= {"owner/adapters": adapters}
    with running(Hub(repositories, private="owner/secret", gated="owner/gated")) as served:
        yield served


@pytest.fixture(autouse=True)
def home(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Connected to the hub, with an empty cache and no token; a test that goes offline says so."""
    for name, value in (
        ("ENDPOINT", hub.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_CACHE", str(tmp_path / "hub")),
        ("HF_HUB_OFFLINE", False),
        ("HF_TOKEN_PATH", str(tmp_path / "token")),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub.requests.clear()
    hub.ranges.clear()
    return tmp_path


def _refused(get: Callable[[], object]) -> str:
    with pytest.raises(FlashdiffError) as error:
        get()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_base_is_downloaded_once_and_only_what_is_loaded(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    base = find_base("owner/tiny")
    assert base.name == COMMIT
    sent = hub.downloaded
    assert sorted({path.relative_to(base).as_posix() for path in base_files(base)}) == sent
    assert not [name for name in sent if name.endswith((".bin", ".ckpt", ".md")) or "fp16" in name]
    hub.requests.clear()
    assert find_base("owner/tiny") == base
    assert hub.downloaded == []
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (find_base("owner/tiny"), hub.requests) == (base, [])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert find_base("owner/tiny") == base


def test_a_lora_is_its_folder_its_only_file_or_the_file_named(hub: Hub) -> None:
    found = find_lora("owner/flash")
    assert (found.name, hub.downloaded) == (WEIGHTS, [FLASH, WEIGHTS])
    assert read_flash_info(found) is not None
    assert lora_name(found) == "flash"
    hub.requests.clear()
    assert find_lora("owner/styles/one.safetensors@v1").name == "one.safetensors"
    assert hub.downloaded == ["one.safetensors"]
    assert find_lora(f"owner/flash/{KOHYA}").name == KOHYA


def test_an_adapter_of_peft_comes_with_its_settings(hub: Hub, tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        (tmp_path / name).write_text(name)
    hub.repositories["owner/adapter"] = tmp_path
    found = find_lora("owner/adapter")
    assert (lora_name(found), hub.downloaded) == ("adapter", ["adapter_config.json", "adapter_model.safetensors"])


def test_a_variant_is_downloaded_alone_and_shown_under_plain_names(hub: Hub) -> None:
    base = find_base("owner/tiny@v1", variant="fp16")
    weights = [name for name in hub.downloaded if name.endswith(".safetensors")]
    assert len(weights) == 3
    assert all(".fp16." in name for name in weights)
    assert base.name == "tiny"
    assert (base / "unet" / "diffusion_pytorch_model.safetensors").resolve().is_file()


def test_a_broken_download_goes_on_where_it_ended(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what the file on disk grows by
    hub.breaks_off = "unet/diffusion_pytorch_model.safetensors"
    find_base("owner/tiny")
    assert hub.breaks_off is None
    (asked,) = hub.ranges
    assert int(asked.removeprefix("bytes=").rstrip("-")) >= 1 << 16


def test_a_private_repository_needs_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    said = _refused(lambda: find_lora("owner/secret"))
    assert said.startswith("no LoRA 'owner/secret': neither a file nor a folder, and the hub did not give it")
    assert "it is not there or private: check the name; if it is private, set HF_TOKEN" in said
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert find_lora("owner/secret").name == WEIGHTS


@pytest.mark.parametrize(
    ("get", "said"),
    [
        (lambda: find_base("owner/gated"), "accept it at https://huggingface.co/owner/gated, then set HF_TOKEN"),
        (
            lambda: find_base("owner/no"),
            "no base model 'owner/no': not a directory, and the hub did not give it (it is not there",
        ),
        (lambda: find_base("owner/tiny@v9"), "it has no revision 'v9'"),
        (lambda: find_base("owner/styles"), "owner/styles on the hub is no diffusers model: it has no model_index.json"),
        (lambda: find_base("owner/tiny", variant="bf16"), "--variant bf16: owner/tiny has no such weights; it has fp16"),
        (lambda: find_base("owner/tiny/unet"), "a hub id has the form owner/name[@revision]"),
        (lambda: find_lora("owner/styles"), "several, one.safetensors, other.safetensors among them; give owner/styles/"),
        (lambda: find_lora("owner/styles/third.safetensors"), "owner/styles on the hub has no file third.safetensors"),
        (lambda: find_vae("owner/styles"), "owner/styles on the hub has no config.json"),
        (lambda: find_adapter("owner/adapters/models/no.safetensors", None), "on the hub has no file models/no.safetensors"),
        (
            lambda: find_adapter("owner/adapters/models/ip.bin", None),
            "a pickle, which may run any program; take the ",
        ),
        (lambda: find_adapter("owner/styles/one.safetensors", None), "owner/styles/image_encoder on the hub has no config.json"),
    ],
)
def test_each_refusal_of_the_hub_says_what_to_do(get: Callable[[], object], said: str) -> None:
    assert said in _refused(get)


def test_without_a_connection_or_permission_the_cache_is_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = "it is not in the cache, and HF_HUB_OFFLINE forbids a download; unset it, or give a local path"
    assert said in _refused(lambda: find_base("owner/tiny"))
    assert said in _refused(lambda: find_lora("owner/flash"))
    assert said in _refused(lambda: find_lora("owner/styles/one.safetensors"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "it is not in the cache, and it cannot be reached" in _refused(lambda: find_base("owner/tiny"))


def test_an_autoencoder_comes_from_a_folder_of_a_repository(hub: Hub) -> None:
    assert find_vae("owner/tiny/vae").name == "vae"
    assert hub.downloaded == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]


def test_an_ip_adapter_comes_with_the_image_encoder_next_to_it(hub: Hub) -> None:
    found = find_adapter("owner/adapters/models/ip.safetensors", None)
    assert (found.file.name, found.encoder.name) == ("ip.safetensors", "image_encoder")
    encoder = ["models/image_encoder/config.json", "models/image_encoder/model.safetensors"]
    assert hub.downloaded == [*encoder, "models/ip.safetensors"]
    again = find_adapter(str(found.file), "owner/adapters/models/image_encoder")
    assert again.encoder == found.encoder


@pytest.mark.slow
def test_the_command_line_takes_hub_names(hub: Hub, home: Path) -> None:
    command = ["build-engine", "owner/tiny", "--revision", "v1", "--variant", "fp16", "--lora", "owner/flash"]
    own = {"HF_HUB_DISABLE_TELEMETRY": "", "DO_NOT_TRACK": ""}
    own |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "0", "XDG_CACHE_HOME": str(home / "cache")}
    planned = subprocess.run(
        [sys.executable, "-m", "flashdiff", *command, "--out", str(home / "out"), "--dry-run"],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
    )
    assert planned.returncode == 0, planned.stderr
    assert "+ flash x 1" in planned.stdout
    asked = r"(GET|HEAD) (/api/models/owner/(tiny|flash)(/(revision|tree)/.*)?|/owner/(tiny|flash)/resolve/.*)"
    assert not [request for request in hub.requests if not re.fullmatch(asked, request)]  # neither telemetry nor a list of agents
    assert "in another precision" in planned.stdout


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("owner/name", HubName(repository="owner/name", file=None, revision=None)),
        ("owner/name@v1.0", HubName(repository="owner/name", file=None, revision="v1.0")),
        (
            "owner/name/sub/a.safetensors@refs/pr/1",
            HubName(repository="owner/name", file="sub/a.safetensors", revision="refs/pr/1"),
        ),
        (f"owner/name@{COMMIT}", HubName(repository="owner/name", file=None, revision=COMMIT)),
        ("name", None),
        ("./owner/name", None),
        ("/owner/name", None),
        ("../name", None),
        ("owner/../name", None),
        ("loras/style.safetensors", None),
        ("owner/name@", None),
        ("owner name/x", None),
        ("", None),
    ],
)
def test_names_on_the_hub_are_distinguished_from_paths(text: str, name: HubName | None) -> None:
    assert hub_name(text) == name
    if name:
        assert str(name) == text
