"""A bundle is replaced by its alias on two replicas under load."""

import json
import re
import urllib.request
from pathlib import Path

import pytest
from replicas import Load, running_replicas
from served import until

pytestmark = pytest.mark.slow

# A bundle is a folder whose manifest holds its hash; opening it takes as long as the fake model does.
_REPOSITORY = """
import json
from served import ModelIdentity
hash_of = lambda folder: json.loads((folder / "manifest.json").read_text())["hash"]
def open_model(folder):
    folder = folder.resolve()
    identity = ModelIdentity(folder.name, hash_of(folder), "fake", "fake", "fp32")
    return model_of(FakeComponents(delay_s=0.01), identity)
repository = Path({repository!r})
opener = lambda: Models({{"latest": open_model(repository / "latest")}}, repository, opener=open_model, identify=hash_of)
"""


def _point(repository: Path, bundle: str) -> None:
    """Replace the alias in one step."""
    (repository / "new").symlink_to(bundle)
    (repository / "new").rename(repository / "latest")


def _metrics(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        return page.read().decode()


def _load_latest(port: int) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v2/repository/models/latest/load", method="POST")
    urllib.request.urlopen(request, timeout=60).close()


def test_no_request_is_lost_and_both_hashes_are_seen(tmp_path: Path) -> None:
    repository, old, new = tmp_path / "models", "1" * 64, "2" * 64
    for name, hash_ in (("student-1", old), ("student-2", new)):
        (repository / name).mkdir(parents=True)
        (repository / name / "manifest.json").write_text(json.dumps({"hash": hash_}))
    _point(repository, "student-1")
    setup = _REPOSITORY.format(repository=str(repository))
    with running_replicas(tmp_path, ", http_port=0", setup, is_up="HTTP on") as (replicas, _):
        address = "ipv4:" + ",".join(f"127.0.0.1:{replica.port}" for replica in replicas)
        with Load(address, round_robin=True) as load:
            load.wait_for(20)
            assert set(load.hashes) == {old}
            _point(repository, "student-2")
            first, second = (int(re.findall(r"HTTP on 127\.0\.0\.1:(\d+)", replica.log)[-1]) for replica in replicas)
            _load_latest(first)
            until(lambda: load.hashes[new] > 5)
            before = load.hashes[old]
            until(lambda: load.hashes[old] > before + 5)  # of the replica that has the old one still
            _load_latest(second)
            load.wait_for(20)  # those that ran on the old one may end first
            before = load.hashes[old]
            load.wait_for(20)
            assert load.hashes[old] == before
        assert load.lost == []
        for replica in replicas:
            until(lambda replica=replica: 'flashdiff_requests_total{model="student-2"' in _metrics(replica.metrics))  # type: ignore[misc]
            page = _metrics(replica.metrics)
            assert re.search(r'flashdiff_request_seconds_count\{model="student-1"\} [1-9]', page)
            assert f'bundle_hash="{new}",model="student-2",name="latest"' in page
            assert old not in page
