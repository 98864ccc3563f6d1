"""`flashdiff serve`."""

import argparse
import os
from pathlib import Path

from flashdiff import defaults
from flashdiff.cli.build_options import add_build_arguments, refuse_without_base
from flashdiff.cli.bundles import bundle_of_base, find_bundles
from flashdiff.cli.environment import Variables
from flashdiff.cli.shared import need
from flashdiff.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundles",
        type=Path,
        nargs="*",
        metavar="BUNDLE",
        help="a model, named after its folder; the first is the default; 'avatars' without such a folder is the embedded model",
    )
    parser.add_argument(
        "--repository", type=Path, metavar="FOLDER", help="folder of bundles that clients may load by name while the server runs"
    )
    parser.add_argument(
        "--loras",
        type=Path,
        metavar="FOLDER",
        help="LoRAs that requests may name, for bundles with --lora-slots: NAME.safetensors, or folders; read when first used",
    )
    parser.add_argument(
        "--expect-bundle",
        action="append",
        default=[],
        metavar="HASH",
        help="open only a bundle of this hash, so that all replicas of a pool serve the same; 12 digits do; may be repeated",
    )
    parser.add_argument(
        "--device",
        metavar="LIST",
        help="GPUs by number (0,1) or core sets (cpu:0-3,cpu:4-7), each with a copy of the models; default: one GPU or all cores",
    )
    parser.add_argument(
        "--host", default=defaults.HOST, help="address to listen on, or unix:/PATH, a socket for gRPC; default: %(default)s"
    )
    parser.add_argument("--port", type=int, default=defaults.PORT, help="gRPC port; default: %(default)s; 0 takes a free one")
    parser.add_argument(
        "--http-port",
        type=int,
        metavar="PORT",
        help="serve HTTP too (a page to try models on, OpenAI's images API, KServe v2), on the same host; default: no",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin of a web page that may use HTTP, as https://host[:port]; may be repeated",
    )
    parser.add_argument(
        "--alias",
        action="append",
        default=[],
        metavar="ALIAS=NAME",
        help="another name of a model for OpenAI's clients, as gpt-image-1=student; may be repeated",
    )
    parser.add_argument(
        "--tokens", type=Path, metavar="FILE", help="require a token of this file: lines of NAME TOKEN [CALLS-PER-SECOND]"
    )
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM certificate chain")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM private key")
    parser.add_argument(
        "--tls-client-ca", type=Path, metavar="FILE", help="accept only clients with a certificate of this authority"
    )
    parser.add_argument("--no-auth", action="store_true", help="serve a public --host without authentication")
    parser.add_argument(
        "--shared-memory", action="store_true", help="let Triton clients on this machine pass tensors through shared memory"
    )
    parser.add_argument(
        "--metrics-host", default=defaults.HOST, metavar="HOST", help="address of --metrics-port; default: %(default)s"
    )
    parser.add_argument(
        "--metrics-port", type=int, metavar="PORT", help="Prometheus metrics, and /healthz and /readyz; plain HTTP; default: none"
    )
    parser.add_argument(
        "--drain",
        type=float,
        default=defaults.DRAIN_S,
        metavar="SECONDS",
        help="after SIGTERM, how long accepted requests may take; default: %(default)s",
    )
    parser.add_argument(
        "--drain-delay",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="after SIGTERM, keep accepting requests for this long while reporting NOT_SERVING, so that balancers notice; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--max-connection-age",
        type=float,
        metavar="SECONDS",
        help="close gRPC connections after this time, so that clients find new replicas; calls under way get --drain seconds; "
        "default: never",
    )
    parser.add_argument("--log-format", choices=defaults.LOG_FORMATS, default="text", help="default: %(default)s")
    building = parser.add_argument_group(
        "build from a base", "the bundle is kept in the cache, and reused while it is up to date"
    )
    building.add_argument(
        "--base",
        metavar="BASE",
        help="serve this diffusers model directory, hub id or recipe as well, named after it and its LoRAs",
    )
    add_build_arguments(parser, building)
    parser.epilog = "Every option can be given by the variable in brackets; the command line wins, and an empty variable is none."
    parser.set_defaults(variables=Variables(parser))


def run(options: argparse.Namespace) -> None:
    """Serve bundles over gRPC, and HTTP with --http-port, until SIGTERM or Ctrl-C; then finish accepted requests and exit.

    The exit status is 0 after such a drain, and 1 after a failure.
    """
    options.variables.fill(options, os.environ)
    need("server", "grpc", "grpc_health", "grpc_reflection", "prometheus_client")
    if options.http_port is not None:
        need("http", "starlette", "uvicorn", "python_multipart")
    ports = (("--port", options.port), ("--http-port", options.http_port), ("--metrics-port", options.metrics_port))
    for option, port in ports:
        if port is not None and not 0 <= port <= 65535:
            raise ConfigError(f"{option} {port}: give a number from 0 to 65535")
    if options.base is None:
        refuse_without_base(options)
        if not options.bundles and not options.repository:
            raise ConfigError("give a BUNDLE, a --base to build one from, or a --repository to load some from")
    if options.repository and not options.repository.is_dir():
        raise ConfigError(f"--repository {options.repository}: there is no such folder")
    if options.loras and not options.loras.is_dir():
        raise ConfigError(f"--loras {options.loras}: there is no such folder")
    from flashdiff.engines.backends import best_backend
    from flashdiff.engines.runtime.device import DEFAULT_DEVICE, parse_devices
    from flashdiff.server.app import Listen, check_listen
    from flashdiff.server.json_log import write_json
    from flashdiff.server.loras import LoraFolder
    from flashdiff.server.opening import ExpectedBundles, open_models
    from flashdiff.server.process import run_server

    listen = Listen(
        host=options.host,
        port=options.port,
        tokens=options.tokens,
        tls_cert=options.tls_cert,
        tls_key=options.tls_key,
        tls_client_ca=options.tls_client_ca,
        shared_memory=options.shared_memory,
        no_auth=options.no_auth,
        metrics_host=options.metrics_host,
        metrics_port=options.metrics_port,
        http_port=options.http_port,
        allowed_origins=tuple(options.allow_origin),
        aliases=tuple(map(_parse_alias, options.alias)),
        drain_s=options.drain,
        drain_delay_s=options.drain_delay,
        max_connection_age_s=options.max_connection_age,
    )
    expected = ExpectedBundles(tuple(options.expect_bundle))
    if options.log_format == "json":
        write_json()
    devices = (DEFAULT_DEVICE,) if options.device is None else parse_devices(options.device)
    if options.backend is None and (options.device or "").startswith("cpu:"):
        options.backend = best_backend(on_cpu=True)
    check_listen(listen)  # before `find_bundles`, which may build the embedded model
    bundles = find_bundles(options.bundles)
    if options.base is not None:
        bundles.append(bundle_of_base(options))
    for bundle in bundles:
        expected.check(bundle)
    loras = LoraFolder(options.loras) if options.loras else None
    run_server(lambda: open_models(bundles, options.repository, devices, expected, loras), listen)


def _parse_alias(text: str) -> tuple[str, str]:
    alias, _, name = text.partition("=")
    if not alias or not name:
        raise ConfigError(f"--alias {text}: write ALIAS=NAME")
    return alias, name
