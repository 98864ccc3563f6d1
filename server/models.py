"""What a server serves: names, each pointing at an opened model; names change while requests run."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import Components, Costs, Tensors
from flashdiff.engines.runtime.device import DEFAULT_DEVICE, Device
from flashdiff.errors import BundleError, NotFoundError, OverloadedError, RepositoryError
from flashdiff.files import shown_bytes
from flashdiff.generate import unconditional_of
from flashdiff.lora_slots import SlotTable
from flashdiff.parts import Phase
from flashdiff.preview import fit_preview
from flashdiff.server.costs import CostTable
from flashdiff.server.loras import LoraFolder
from flashdiff.server.names import ModelIdentity

_EMBEDDING_BYTES = 64 * 1024**2
_CGROUP = Path("/sys/fs/cgroup")  # of the container that this runs in, if it does
_MEMORY_PER_BUNDLE_BYTE = 2.0  # weights as the engine holds them, and its buffers


class Embeddings:
    """The encoded texts and references last used, at most 64 MiB of them; safe to use from any thread.

    A text is known by itself, a reference by the digest of its pixels.
    """

    def __init__(self, max_bytes: int = _EMBEDDING_BYTES) -> None:
        self._max_bytes, self.bytes = max_bytes, 0
        self._kept: OrderedDict[str | bytes, Tensors] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str | bytes) -> Tensors | None:
        """What was encoded without B, such as [T, D] by name; None where it is not kept."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def __contains__(self, key: str | bytes) -> bool:
        with self._lock:
            return key in self._kept

    def put(self, key: str | bytes, encoded: Tensors) -> None:
        """Keep a copy of what was encoded, [T, D] or the like by name; drop what was used longest ago beyond the limit."""
        with self._lock:
            if key in self._kept:
                return
            # Copies: a row of a batch would keep the whole batch alive.
            self._kept[key] = {name: values.copy() for name, values in encoded.items()}
            self.bytes += _size_of(encoded)
            while self.bytes > self._max_bytes:
                self.bytes -= _size_of(self._kept.popitem(last=False)[1])


def _size_of(encoded: Tensors) -> int:
    return sum(values.nbytes for values in encoded.values())


class Model:
    """An opened model, warmed up with costs that were just measured. Only the worker's threads call `components`.

    Of a bundle that is open on several devices, the protocols see the model of the first; `others` are those of the others.
    """

    def __init__(
        self,
        identity: ModelIdentity,
        components: Components,
        measured: Costs,
        device: Device = DEFAULT_DEVICE,
        others: "Sequence[Model]" = (),
        slots: SlotTable | None = None,
    ) -> None:
        """`slots` reads LoRA files, for a model that takes any."""
        self.identity, self.components, self.device, self.slots = identity, components, device, slots
        self._others = {other.device: other for other in others}
        spec, names = components.spec, {Phase.PREPARE: "input_image", Phase.STEP: "denoise", Phase.FINISH: "decode"}
        self.stages = {part.name: names[part.phase] for part in spec.parts} | {spec.text_part.name: "text"}
        """By part, the name of its stage in timings."""
        self.costs = CostTable(spec, measured)
        self.embeddings = Embeddings()
        self.unconditional: Tensors | None = unconditional_of(components)
        self.preview_colors: NDArray[np.float32] = fit_preview(components)

    def on(self, device: Device) -> "Model | None":
        """The same bundle as it is open on that device; None where it is not."""
        return self if device == self.device else self._others.get(device)


class Models:
    """The names a server answers to; safe to use from any thread.

    A bundle that several names lead to is opened once: `identify` gives its hash without opening it. A request keeps the model
    that its name led to when it came, so loading a name again (after its folder or symbolic link was changed) ends no request;
    the old model goes with its last one.
    """

    def __init__(
        self,
        served: Mapping[str, Model],
        repository: Path | None = None,
        *,
        opener: Callable[[Path], Model] | None = None,
        identify: Callable[[Path], str] | None = None,
        devices: Sequence[Device] = (DEFAULT_DEVICE,),
        loras: LoraFolder | None = None,
    ) -> None:
        """Each model is open on all of the `devices`, and `opener` opens the others so; `loras` are those of requests."""
        self.devices, self.loras = tuple(devices), loras
        self._served = dict(served)
        self._default = next(iter(self._served), "")
        self._repository, self._opener, self._identify = repository, opener, identify
        self._changing = threading.Lock()

    def lose(self, device: Device) -> None:
        """Open models no more on a device that has failed; the last one stays."""
        with self._changing:
            self.devices = tuple(kept for kept in self.devices if kept != device) or self.devices

    @property
    def served(self) -> dict[str, Model]:
        """The names and their models, the default first."""
        return dict(self._served)

    def get(self, name: str = "") -> Model:
        """The model of that name, or the first without one; NotFoundError names those there are."""
        served = self.served
        if not name and served:
            return served.get(self._default) or next(iter(served.values()))
        if name not in served:
            raise NotFoundError("model", name, f"this server has {', '.join(served) or 'none'}")
        return served[name]

    def available(self) -> list[str]:
        """Names in the repository, served or not; RepositoryError when it cannot be read."""
        if self._repository is None:
            return []
        try:
            return sorted(path.name for path in self._repository.iterdir() if _is_bundle(path))
        except OSError as error:
            raise _unreadable(self._repository, error) from None

    def load(self, name: str, is_given_up: Callable[[], bool] = lambda: False) -> None:
        """Open what the repository has under that name, and answer to it once it is warm, unless the load is given up by then.

        Loads come one at a time: see `repository`.
        """
        if self._repository is None or self._opener is None or self._identify is None:
            raise BundleError("this server was started without --repository: what it serves does not change")
        if name not in (available := self.available()):
            raise NotFoundError("model", name, f"the repository has {', '.join(available) or 'none'}")
        try:
            folder = (self._repository / name).resolve()  # a symbolic link is an alias: follow it now
            wanted = self._identify(folder)
            model = next((m for m in self.served.values() if m.identity.bundle_hash == wanted), None)
            if model is None:
                _ensure_memory(folder, copies=sum(device.gpu is None for device in self.devices) or 1)
                model = self._opener(folder)
        except OSError as error:
            raise _unreadable(self._repository / name, error) from None
        with self._changing:
            if not is_given_up():
                self._served = {**self._served, name: model}

    def unload(self, name: str) -> None:
        """Stop answering to the name; requests that run keep their model."""
        if self._repository is None:
            raise BundleError("this server was started without --repository: what it serves does not change")
        with self._changing:
            if name not in self._served:
                raise NotFoundError("model", name, f"this server has {', '.join(self._served) or 'none'}")
            self._served = {kept: model for kept, model in self._served.items() if kept != name}


def _is_bundle(path: Path) -> bool:
    try:
        return (path / "manifest.json").is_file()
    except OSError:  # that folder alone cannot be read
        return False


def _unreadable(path: Path, error: OSError) -> RepositoryError:
    return RepositoryError(f"the repository's {path.name} cannot be read: {error.strerror or error}")


def _ensure_memory(folder: Path, copies: int) -> None:
    """OverloadedError when opening so many copies of the bundle would not fit into what this machine has free."""
    needed = copies * _MEMORY_PER_BUNDLE_BYTE * sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = _free_memory()
    if free is not None and needed > free:
        raise OverloadedError(
            f"opening '{folder.name}' takes about {shown_bytes(needed)} and {shown_bytes(free)} are free; unload a model first"
        )


def _free_memory() -> int | None:
    """Bytes, by the kernel's own estimate and within what a container may have; None where there is none to read."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        most, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
    except (OSError, ValueError, KeyError):  # no container, or one without a limit ("max")
        return free
    return min(free, most - used + int(cached))
