"""The models of real size: that they are, and how a build's stages are read."""

import pytest

from benchmarks.real_size import NETWORKS, network_parameters
from benchmarks.sizes import laps


@pytest.mark.parametrize(
    ("name", "published"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684), ("pixart", 610_856_096), ("sd3", 2_028_328_000)]
)
def test_networks_have_the_published_size(name: str, published: int) -> None:
    assert name in NETWORKS
    assert network_parameters(name) == pytest.approx(published, rel=1e-3)


def test_stages_are_read_off_what_a_build_says() -> None:
    told = "building because\nfuse       1.5 s  base (sd15)\nexport    20.0 s  denoiser to ONNX\nverify     3.0 s  image"
    assert laps(told) == {"fuse": 1.5, "export denoiser": 20.0, "verify": 3.0}
