"""`flashdiff plan`."""

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashdiff import defaults
from flashdiff.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from flashdiff.server.planning.plan import Demand, Forecast

_OFF = 0.01  # how far the shares of a mix may be from 1, as those of 2:0.33,4:0.33,8:0.33 are


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle, or 'avatars', the embedded model")
    parser.add_argument("--rate", type=float, required=True, metavar="N", help="requests a second, of one image each")
    parser.add_argument(
        "--p99", type=float, required=True, metavar="SECONDS", help="within which 99 %% of all requests are to be answered"
    )
    parser.add_argument(
        "--mix", metavar="STEPS:SHARE[,...]", help="of the requests, as 2:0.5,4:0.5; default: all with the model's steps"
    )
    parser.add_argument("--size", metavar="WxH", help="of the images; default: the model's")
    parser.add_argument(
        "--format", choices=defaults.IMAGE_FORMATS, default=defaults.IMAGE_FORMATS[0], help="of the files; default: %(default)s"
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="the deadline that clients set; default: they set none")
    parser.add_argument(
        "--device",
        metavar="LIST",
        help="what to measure, as of serve; several are measured at the same time, and those that are counted are like them; "
        "default: one GPU or all cores",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """Say how many devices a load needs, by the bundle's costs on this machine and the server's scheduling on a simulated clock.

    Prints the fewest devices that answer 99 % of the requests in time, and the latencies, refusals and utilization to expect.
    """
    for name in ("rate", "p99", "timeout"):
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"--{name} {value:g}: give a number above 0")
    mix = parse_mix(options.mix) if options.mix is not None else None
    from flashdiff.cli.bundles import find_bundles
    from flashdiff.engines.bundle import read_manifest
    from flashdiff.engines.config import parse_sizes
    from flashdiff.engines.runtime.device import DEFAULT_DEVICE, parse_devices
    from flashdiff.server.planning.measuring import measure, open_together
    from flashdiff.server.planning.plan import Demand, plan
    from flashdiff.tasks import check_order, check_size
    from flashdiff.tasks.samples import needed_inputs

    if options.json:
        logging.getLogger("flashdiff").setLevel(logging.WARNING)
    sizes = parse_sizes(options.size) if options.size else (None,)
    if len(sizes) > 1:
        raise ConfigError(f"--size {options.size}: give one size")
    devices = (DEFAULT_DEVICE,) if options.device is None else parse_devices(options.device)
    (bundle,) = find_bundles([options.bundle])
    spec = read_manifest(bundle).model
    mix = mix or {spec.sampler.default_steps: 1.0}
    for steps in mix:
        try:
            size = check_size(spec, sizes[0])
            check_order(spec, prompt="p", steps=steps, size=size, inputs=needed_inputs(spec, size))
        except RequestError as error:
            raise ConfigError(f"--{'mix' if error.field == 'steps' else error.field}: {error}") from None
    cores = {core for device in devices for core in device.cores}
    if cores and cores == os.sched_getaffinity(0):  # which not every system has
        print(
            f"{options.device} is every core of this process: the server's other threads and its clients would take time "
            "from the devices, which the plan does not count; leave a core free",
            file=sys.stderr,
        )
    measured = measure(open_together(bundle, devices), devices, mix, sizes[0], options.format)
    demand = Demand(
        rate=options.rate,
        p99_s=options.p99,
        mix=mix,
        size=measured.size,
        timeout_s=options.timeout,
        files_s=measured.files_s,
    )
    found = plan(measured.components, measured.costs, demand, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(_record(demand, found), indent=2) if options.json else "\n".join(_lines(demand, found)))


def parse_mix(text: str) -> dict[int, float]:
    """`2:0.5,4:0.5` as shares by steps that sum to 1; ConfigError for anything else."""
    shares: dict[int, float] = {}
    for item in text.split(","):
        steps, _, share = item.partition(":")
        try:
            number, value = int(steps), float(share)
        except ValueError:
            raise ConfigError(f"--mix '{text}': '{item}' is not STEPS:SHARE, as in 2:0.5,4:0.5") from None
        if number in shares:
            raise ConfigError(f"--mix '{text}': {number} steps are there twice")
        if not 0 < value <= 1:
            raise ConfigError(f"--mix '{text}': the share {share} of {number} steps must be above 0 and at most 1")
        shares[number] = value
    total = sum(shares.values())
    if abs(total - 1) > _OFF + 1e-9:
        raise ConfigError(f"--mix '{text}': the shares sum to {total:g}, they must sum to 1")
    return {steps: share / total for steps, share in shares.items()}


def _record(demand: "Demand", found: "Forecast") -> Mapping[str, Any]:
    return {
        "demand": {**vars(demand), "size": str(demand.size), "mix": {str(steps): share for steps, share in demand.mix.items()}},
        **vars(found),
    }


def _lines(demand: "Demand", found: "Forecast") -> list[str]:
    times = ", ".join(f"{name} {'-' if ms is None else f'{ms:g}'}" for name, ms in found.latency_ms.items())
    why = "".join(f", {count} {error}" for error, count in found.refusals.items())
    return [
        f"devices      {found.devices}{f', on at least {found.servers} servers' if found.servers > 1 else ''}",
        f"in time      {found.in_time:.1%} of the requests within {demand.p99_s:g} s",
        f"latency      {times} ms, from arrival to the file",
        f"refused      {found.refused:.1%}{why}",
        f"utilization  {found.utilization:.0%}",
        f"batch        {found.mean_batch:.1f} slots in a request's steps, on average",
    ]
