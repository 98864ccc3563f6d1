"""What an engine runs on: one GPU of this machine, or a set of its cores."""

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

from flashdiff.engines.runtime.machine import count_gpus
from flashdiff.errors import ConfigError

T = TypeVar("T")

_SYNTAX = "write GPUs by number, as 0,1, or core sets, as cpu:0-3,cpu:4-7 (cpu:0-3+8-11 is one set)"
_CORES = re.compile(r"cpu:\d{1,5}(-\d{1,5})?(\+\d{1,5}(-\d{1,5})?)*")


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device of this machine. Without a name it is the default: the first GPU, or all cores that the process may use."""

    name: str = ""
    """In logs and metrics, as cuda:0 or cpu:0-3."""
    gpu: int | None = None
    """The number of a GPU; None for the first one, and on a CPU."""
    cores: tuple[int, ...] = ()
    """The only cores that its threads may use; empty: any."""

    @property
    def gpu_index(self) -> int:
        """The GPU's index; 0 on a machine whose GPU was not chosen."""
        return self.gpu or 0

    def pin(self) -> None:
        """Confine the current thread, and the threads that it starts from now on, to the cores."""
        if self.cores:
            os.sched_setaffinity(0, self.cores)

    def run(self, work: Callable[[], T]) -> T:
        """What `work` returns; on a set of cores it is done by a thread of its own that is confined to them.

        Bundles must be opened so: OpenVINO runs an engine's calls on the cores of the thread that opened the first engine in
        that thread, so two engines that one thread opened, each pinned to other cores, would share the first one's.
        """
        if not self.cores:
            return work()
        with ThreadPoolExecutor(1, initializer=self.pin) as thread:
            return thread.submit(work).result()


DEFAULT_DEVICE = Device()


def parse_devices(text: str) -> tuple[Device, ...]:
    """The devices of a list such as `0,1` or `cpu:0-3,cpu:4-7`; ConfigError when this machine lacks one, or two overlap."""
    try:
        devices = tuple(_parse(item.strip()) for item in text.split(","))
        if len({device.gpu is None for device in devices}) > 1:
            raise ConfigError("a bundle is made for GPUs or for CPUs; give devices of one kind")
        for one, other in combinations(devices, 2):
            if one.name == other.name:
                raise ConfigError(f"{one.name} is there twice")
            if shared := {*one.cores} & {*other.cores}:
                raise ConfigError(f"core {min(shared)} is in both {one.name} and {other.name}")
        _check_present(devices)
    except ConfigError as error:
        raise ConfigError(f"--device {text}: {error}") from None
    return devices


def _parse(item: str) -> Device:
    if re.fullmatch(r"\d{1,5}", item):
        return Device(name=f"cuda:{int(item)}", gpu=int(item))
    if not _CORES.fullmatch(item):
        raise ConfigError(f"'{item}' is no device; {_SYNTAX}")
    cores = set[int]()
    for part in item.removeprefix("cpu:").split("+"):
        first, _, last = part.partition("-")
        if not (given := range(int(first), int(last or first) + 1)):
            raise ConfigError(f"'{part}' has no cores; {_SYNTAX}")
        cores.update(given)
    return Device(name=item, cores=tuple(sorted(cores)))


def _check_present(devices: Sequence[Device]) -> None:
    if gpus := [device.gpu for device in devices if device.gpu is not None]:
        count = count_gpus()
        if max(gpus) >= count:
            have = f"this machine has GPUs 0 to {count - 1}" if count else "this machine has no NVIDIA GPU"
            raise ConfigError(f"there is no GPU {max(gpus)}: {have}")
        return
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("this system cannot confine a thread to cores")
    usable = os.sched_getaffinity(0)
    for device in devices:
        if absent := [core for core in device.cores if core not in usable]:
            listed = ", ".join(map(str, sorted(usable)))
            raise ConfigError(f"there is no core {absent[0]} for this process, which may use {listed}")
