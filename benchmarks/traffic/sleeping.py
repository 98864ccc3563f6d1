"""A model whose device calls sleep for given times and compute nothing, so that client and server have all cores."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import Components, Costs, Tensors
from flashdiff.engines.runtime.device import Device
from flashdiff.server.costs import CostTable, bucket_of
from flashdiff.server.models import Model


class SleepingComponents:
    """Implements `Components`: a call returns what the first row of the part's first call gave, after the time it costs."""

    def __init__(self, components: Components, table: CostTable) -> None:
        self.spec, self.max_batch, self.parallel_decode = components.spec, components.max_batch, components.parallel_decode
        self._components = components
        size = components.spec.sizes[0]
        self._costs = {
            part.name: table.first[size][part.name] for part in components.spec.parts if part.name in table.first[size]
        }
        self._rows: dict[str, Tensors] = {}

    def tokenize(self, prompts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """Those of the model."""
        return self._components.tokenize(prompts)

    def call(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """Outputs [B, ...] for inputs [B, ...]; the model itself is called once a part, to know their shapes."""
        count = len(next(iter(inputs.values())))
        if part not in self._rows:
            self._rows[part] = {name: output[:1] for name, output in self._components.call(part, inputs).items()}
        time.sleep(self._costs[part][bucket_of(self._costs[part], count)] / 1000)
        return {name: np.repeat(row, count, axis=0) for name, row in self._rows[part].items()}


def let_sleep(model: Model, costs: Sequence[Costs], devices: Sequence[Device]) -> None:
    """Let the model's calls on each device take what these costs say, at the model's first size."""
    for of, device in zip(costs, devices, strict=True):
        own = model.on(device)
        assert own
        own.costs = CostTable(own.components.spec, of)
        own.components = SleepingComponents(own.components, own.costs)
