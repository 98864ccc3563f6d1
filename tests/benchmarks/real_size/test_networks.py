"""The public networks have their published sizes."""

import pytest

from benchmarks.real_size.networks import NETWORKS, network_parameters


@pytest.mark.parametrize(
    ("name", "published"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684), ("pixart", 610_856_096), ("sd3", 2_028_328_000)]
)
def test_networks_have_the_published_size(name: str, published: int) -> None:
    assert name in NETWORKS
    assert network_parameters(name) == pytest.approx(published, rel=1e-3)
