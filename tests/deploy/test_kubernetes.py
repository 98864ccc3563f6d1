"""The manifests of deploy/kubernetes: what Kubernetes takes, and what the program has.

`kubectl kustomize` puts them together, and `kubernetes-validate` brings the schemas of Kubernetes; those of KEDA and of the
Prometheus Operator come from npm. No cluster has seen them, and of KServe's InferenceService only the pod in it is checked.
"""

import argparse
import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flashdiff.cli import serve
from flashdiff.cli.environment import PREFIX
from flashdiff.errors import FlashdiffError
from flashdiff.server.http.front import OPEN_TO_ALL
from flashdiff.server.metrics import Metrics
from flashdiff.server.metrics_page import LIVE, READY

yaml = pytest.importorskip("yaml")

PLACE = Path(__file__).parents[2] / "deploy" / "kubernetes"
OVERLAYS = sorted(path.name for path in (PLACE / "overlays").iterdir())
_CUSTOM = {"ScaledObject", "ServiceMonitor", "PodMonitor", "InferenceService"}
_POLICY, _SERVICE = "NetworkPolicy", "Service"
Object = dict[str, Any]


def _built(overlay: str) -> list[Object]:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed: it puts the overlays together")
    done = subprocess.run(["kubectl", "kustomize", PLACE / "overlays" / overlay], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def _pod(objects: list[Object]) -> Object:
    for one in objects:
        if one["kind"] == "Deployment":
            return one["spec"]["template"]["spec"]
        if one["kind"] == "InferenceService":
            return one["spec"]["predictor"]
    raise AssertionError("there is no pod")


def _container(objects: list[Object]) -> Object:
    (container,) = _pod(objects)["containers"]
    return container


def _variables(objects: list[Object]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in _container(objects)["env"]}


def _options(objects: list[Object]) -> argparse.Namespace:
    """What the program makes of the arguments and variables."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    serve.add_arguments(parser)
    command, *arguments = _container(objects)["args"]
    assert command == "serve"
    options = parser.parse_args(arguments)
    options.variables.fill(options, _variables(objects))
    return options


def _selects(selector: Object, labels: Object) -> bool:
    return selector.items() <= labels.items()


def _flaws(objects: list[Object]) -> Iterator[str]:
    """What does not fit the program, or together."""
    pod, container = _pod(objects), _container(objects)
    try:
        options = _options(objects)
    except FlashdiffError as error:
        yield str(error)
        return
    # The pod outlives the drain.
    if pod["terminationGracePeriodSeconds"] < options.drain_delay + options.drain + 5:
        yield "terminationGracePeriodSeconds is shorter than the drain"
    # Ports and probes.
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    serves = {options.port, options.http_port, options.metrics_port}
    yield from (f"port {number} is not served" for number in ports.values() if number not in serves)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        how = container[probe]
        if "grpc" in how and (how["grpc"]["port"] != options.port or options.tls_cert):
            yield f"{probe}: no gRPC without TLS on {how['grpc']['port']}"
        if "httpGet" in how:
            port = how["httpGet"]["port"]
            number = ports.get(port, port)
            paths = {options.metrics_port: {LIVE, READY}, options.http_port: OPEN_TO_ALL}.get(number, set())
            if how["httpGet"]["path"] not in paths:
                yield f"{probe}: {how['httpGet']['path']} is not served on {port}"
    # Files are where something is mounted.
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]] + ["/mnt/models"] * (
        "STORAGE_URI" in _variables(objects)
    )
    files = [*options.bundles, options.tokens, options.tls_cert, options.tls_key, options.tls_client_ca]
    yield from (f"{file} is not mounted" for file in files if file and not any(str(file).startswith(f"{m}/") for m in mounts))
    volumes = {volume["name"] for volume in pod["volumes"]}
    used = {mount["name"] for one in (container, *pod.get("initContainers", [])) for mount in one["volumeMounts"]}
    yield from (f"volume {name} is used or defined alone" for name in used ^ volumes)
    # The user that it runs as.
    if not pod["securityContext"]["runAsNonRoot"] or not container["securityContext"]["readOnlyRootFilesystem"]:
        yield "it may write as root"
    if "/tmp" not in mounts:
        yield "there is no place for the copy of the bundle"
    # Metrics.
    asked = set(re.findall(r"flashdiff_\w+", json.dumps([one for one in objects if one["kind"] in _CUSTOM])))
    yield from (f"there is no metric {name}" for name in asked - {metric.name for metric in Metrics().registry.collect()})
    yield from _flaws_of_selectors(objects, ports)


def _flaws_of_selectors(objects: list[Object], ports: dict[str, int]) -> Iterator[str]:
    of_kind: Callable[[str], list[Object]] = lambda kind: [one for one in objects if one["kind"] == kind]  # noqa: E731
    for deployment in of_kind("Deployment"):
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        for one in [deployment, *of_kind(_SERVICE), *of_kind("PodDisruptionBudget"), *of_kind(_POLICY)]:
            key = "podSelector" if one["kind"] == _POLICY else "selector"
            selector = one["spec"][key] if one["kind"] == _SERVICE else one["spec"][key].get("matchLabels", {})
            if not selector or not _selects(selector, labels):
                yield f"{one['kind']}: its selector is not that of the pods"
        for policy in of_kind(_POLICY):
            for rule in policy["spec"]["ingress"]:
                for source in rule["from"]:
                    if _selects(labels, source.get("podSelector", {}).get("matchLabels", {})):
                        yield "NetworkPolicy: clients would need the server's labels"
                yield from (f"NetworkPolicy: no port {port['port']}" for port in rule["ports"] if port["port"] not in ports)
        for service in of_kind(_SERVICE):
            yield from (
                f"Service: no port {port['targetPort']}" for port in service["spec"]["ports"] if port["targetPort"] not in ports
            )
        for scaled in of_kind("ScaledObject"):
            if scaled["spec"]["scaleTargetRef"]["name"] != deployment["metadata"]["name"]:
                yield "ScaledObject: no such deployment"
            if "replicas" in deployment["spec"]:
                yield "two would set the number of replicas"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_options_ports_paths_files_and_selectors_fit_the_program(overlay: str) -> None:
    assert list(_flaws(_built(overlay))) == []


def _set(objects: list[Object], name: str, value: str) -> None:
    entry = next(entry for entry in _container(objects)["env"] if entry["name"] == name)
    entry["value"] = value


_WRONG: list[tuple[Callable[[list[Object]], Any], str]] = [
    (lambda all_: _container(all_)["env"].append({"name": PREFIX + "TOKENZ", "value": "x"}), "did you mean FLASHDIFF_TOKENS?"),
    (lambda all_: _set(all_, "FLASHDIFF_DRAIN", "long"), "a number is needed"),
    (lambda all_: _set(all_, "FLASHDIFF_DRAIN", "50"), "shorter than the drain"),
    (lambda all_: _set(all_, "FLASHDIFF_METRICS_PORT", "9091"), "port 9090 is not served"),
    (lambda all_: _set(all_, "FLASHDIFF_TLS_CERT", "/elsewhere/tls.crt"), "/elsewhere/tls.crt is not mounted"),
    (lambda all_: _container(all_)["readinessProbe"].update(grpc={"port": 50051}), "no gRPC without TLS"),
    (lambda all_: _container(all_)["livenessProbe"]["httpGet"].update(path="/health"), "/health is not served"),
    (lambda all_: _pod(all_)["volumes"].pop(), "used or defined alone"),
    (
        lambda all_: next(one for one in all_ if one["kind"] == _POLICY)["spec"].update(podSelector={}),
        "its selector is not that of the pods",
    ),
    (
        lambda all_: next(one for one in all_ if one["kind"] == "ScaledObject")["spec"]["triggers"][0]["metadata"].update(
            query="flashdiff_pending"
        ),
        "there is no metric flashdiff_pending",
    ),
]


@pytest.mark.parametrize("number", range(len(_WRONG)))
def test_what_does_not_fit_is_found(number: int) -> None:
    spoil, says = _WRONG[number]
    objects = _built("full")
    spoil(objects)
    assert says in "; ".join(_flaws(objects))


def _validate(one: Object) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    kubernetes_validate.validate(one, "1.32", strict=True)


def _as_pod(predictor: Object) -> Object:
    """The pod in an InferenceService."""
    own = ("minReplicas", "maxReplicas", "autoScaling")
    spec = {name: value for name, value in predictor.items() if name not in own}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_own_objects_have_its_schemas(overlay: str) -> None:
    for one in _built(overlay):
        if one["kind"] == "InferenceService":
            _validate(_as_pod(one["spec"]["predictor"]))
        elif one["kind"] not in _CUSTOM:
            _validate(one)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda one: one["spec"]["template"]["spec"].update(terminationGracePeriodSeconds="a minute"),
        lambda one: one["spec"]["template"]["spec"]["containers"][0].update(livenesProbe={}),
        lambda one: one["spec"].pop("selector"),
    ],
)
def test_a_value_that_kubernetes_would_refuse_is_found(spoil: Callable[[Object], Any]) -> None:
    deployment = copy.deepcopy(next(one for one in _built("cpu") if one["kind"] == "Deployment"))
    _validate(deployment)
    spoil(deployment)
    with pytest.raises(Exception, match=r"is not of type|unexpected|is a required property"):
        _validate(deployment)


@pytest.mark.parametrize(("overlay", "protocol"), [("cpu", "kubernetes.io/h2c"), ("full", "https")])
def test_services_say_whether_grpc_is_encrypted(overlay: str, protocol: str) -> None:
    ports = [port for one in _built(overlay) if one["kind"] == "Service" for port in one["spec"]["ports"]]
    assert {port["appProtocol"] for port in ports if port["name"] == "grpc"} == {protocol}


_OPERATOR = "@kubernetes-models/prometheus-operator"
_PACKAGES = {
    "ScaledObject": ("@kubernetes-models/keda@2.0.0", "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject"),
    "ServiceMonitor": (f"{_OPERATOR}@6.0.0", f"{_OPERATOR}/monitoring.coreos.com/v1/ServiceMonitor"),
    "PodMonitor": (f"{_OPERATOR}@6.0.0", f"{_OPERATOR}/monitoring.coreos.com/v1/PodMonitor"),
}


@pytest.mark.slow
def test_objects_of_keda_and_the_prometheus_operator_have_their_schemas(tmp_path: Path) -> None:
    if not shutil.which("npm") or not shutil.which("node"):
        pytest.skip("npm and node are not installed")
    packages = sorted({package for package, _ in _PACKAGES.values()})
    command = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=0", "--prefix", str(tmp_path), *packages]
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"npm cannot install the schemas: {installed.stderr.strip().splitlines()[:1]}")
    objects = {one["kind"]: one for one in [*_built("full"), *_built("kserve")] if one["kind"] in _PACKAGES}
    assert objects.keys() == _PACKAGES.keys()
    for kind, (_, module) in _PACKAGES.items():
        script = (
            f"import {{ readFileSync }} from 'fs'; import {{ {kind} }} from '{module}';"
            f"new {kind}(JSON.parse(readFileSync(0))).validate()"
        )

        def check(one: Object, command: tuple[str, ...] = ("node", "--input-type=module", "-e", script)) -> str:
            done = subprocess.run(command, input=json.dumps(one), capture_output=True, text=True, cwd=tmp_path)
            return done.stderr if done.returncode else ""

        assert check(objects[kind]) == ""
        wrong = copy.deepcopy(objects[kind])
        first = next(value for value in wrong["spec"].values() if isinstance(value, list))
        first[0]["metadata" if kind == "ScaledObject" else "port"] = 7
        assert check(wrong)
