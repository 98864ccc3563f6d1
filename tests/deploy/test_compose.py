"""The compose file: what it names exists in the program, in the folder, and in the other services. No container has run it."""

import argparse
import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flashdiff.cli import serve
from flashdiff.cli.environment import PREFIX
from flashdiff.errors import FlashdiffError
from flashdiff.server.metrics_page import READY

yaml = pytest.importorskip("yaml")

PLACE = Path(__file__).parents[2] / "deploy" / "compose"
Files = dict[str, dict[str, Any]]


def _read() -> Files:
    return {file.stem: yaml.safe_load(file.read_text()) for file in PLACE.glob("*.yaml")}


def _options(service: dict[str, Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    serve.add_arguments(parser)
    command, *arguments = service["command"]
    assert command == "serve"
    options = parser.parse_args(arguments)
    options.variables.fill(options, service["environment"])
    return options


def _flaws(files: Files) -> Iterator[str]:
    services = files["compose"]["services"]
    own = services["flashdiff"]
    try:
        options = _options(own)
    except FlashdiffError as error:
        yield str(error)
        return
    serves = {options.port, options.http_port, options.metrics_port}
    for mapping in own["ports"]:
        host, _, inside = mapping.split(":")
        if host != "127.0.0.1" or int(inside) not in serves:
            yield f"port {mapping} is not served, or open to others"
    if f":{options.metrics_port}{READY}" not in own["healthcheck"]["test"][-1]:
        yield "the health check asks for nothing that is served"
    if int(own["stop_grace_period"].removesuffix("s")) < options.drain_delay + options.drain + 3:
        yield "stop_grace_period is shorter than the drain"
    for name, service in services.items():
        for volume in service.get("volumes", []):
            source, _, _ = volume.rpartition(":ro")[0].rpartition(":")
            if not source.startswith("${") and not (PLACE / source).exists():
                yield f"{name} mounts {source}, which is not there"
    # Addresses between services.
    (scraped,) = files["prometheus"]["scrape_configs"][0]["static_configs"][0]["targets"]
    yield from _unknown(scraped, "flashdiff", options.metrics_port)
    yield from _unknown(files["grafana-datasources"]["datasources"][0]["url"], "prometheus", 9090)
    receiver = files["collector"]["receivers"]["otlp"]["protocols"]["http"]["endpoint"]
    yield from _unknown(own["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"], "collector", int(receiver.rpartition(":")[2]))
    # The collector's pipelines and the dashboards' folder.
    collector = files["collector"]
    for pipeline in collector["service"]["pipelines"].values():
        for kind, names in pipeline.items():
            yield from (f"the collector has no {kind} {name}" for name in names if name not in collector[kind])
    folder = files["grafana-dashboards"]["providers"][0]["options"]["path"]
    if not any(f":{folder}/" in volume for volume in services["grafana"]["volumes"]):
        yield "no dashboard is mounted where Grafana looks"


def _unknown(address: str, host: str, port: int) -> Iterator[str]:
    if re.sub(r"^http://", "", address) != f"{host}:{port}":
        yield f"{address} is not {host}:{port}"


def test_ports_files_and_addresses_fit() -> None:
    assert list(_flaws(_read())) == []


def test_the_dashboard_is_one() -> None:
    assert json.loads((PLACE.parent / "grafana.json").read_text())["panels"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda files: _own(files)["environment"].update({PREFIX + "METRIC_PORT": "1"}), "did you mean FLASHDIFF_METRICS_PORT"),
        (lambda files: _own(files)["environment"].update({PREFIX + "METRICS_PORT": "9"}), "flashdiff:9090 is not flashdiff:9"),
        (lambda files: _own(files).update(stop_grace_period="10s"), "shorter than the drain"),
        (lambda files: _own(files)["ports"].append("50051:50051:50051"), "open to others"),
        (lambda files: files["compose"]["services"]["grafana"]["volumes"].append("./none:/x:ro"), "./none, which is not there"),
        (lambda files: files["collector"]["service"]["pipelines"]["traces"]["exporters"].append("x"), "no exporters x"),
    ],
)
def test_what_does_not_fit_is_found(spoil: Callable[[Files], Any], says: str) -> None:
    files = copy.deepcopy(_read())
    spoil(files)
    assert says in "; ".join(_flaws(files))


def _own(files: Files) -> dict[str, Any]:
    return files["compose"]["services"]["flashdiff"]
