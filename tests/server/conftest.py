from collections.abc import Iterator

import pytest
from served import Running, serving

from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.server.client import Client


@pytest.fixture
def running() -> Iterator[Running]:
    with serving(FakeComponents()) as running:
        yield running


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with Client(running.address) as client:
        client.wait_until_ready(600)
        yield client
