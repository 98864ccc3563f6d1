"""The denoisers of published models, of real size and without weights: as many parameters as their authors say."""

from typing import Any

import diffusers
import pytest
import torch

SD2: dict[str, Any] = {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "sample_size": 96,
    "use_linear_projection": True,
}


@pytest.mark.parametrize(
    ("network", "settings", "millions"),
    [
        pytest.param("UNet2DConditionModel", SD2, 865.9, id="sd2"),
    ],
)
def test_a_network_of_real_size_is_as_large_as_published(network: str, settings: dict[str, Any], millions: float) -> None:
    with torch.device("meta"):
        model = getattr(diffusers, network)(**settings)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
