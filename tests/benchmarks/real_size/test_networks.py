"""The denoisers of published models, of real size and without weights: how large they are, and what a LoRA of them reaches."""

import importlib
import re

import pytest
import torch

from benchmarks.real_size.networks import NETWORKS, PublicNetwork

# Parameters, values in the file (with tables of positions, which authors count), and the share that LoRA targets reach.
SIZES = {
    "sd15": (859_520_964, 859_520_964, 0.11),
    "sd2": (865_910_724, 865_910_724, 0.11),
    "sdxl": (2_567_463_684, 2_567_463_684, 0.37),
    "pixart": (610_856_096, 610_856_096, 0.999),
    "pixart-sigma": (610_856_096, 610_856_096, 0.999),
    "sd3": (2_028_328_000, 2_084_951_104, 0.65),
    "sd35-medium": (2_243_171_520, 2_469_663_936, 0.65),
    "sd35-large": (8_056_627_520, 8_146_280_768, 0.66),
    "flux-dev": (11_901_408_320, 11_901_408_320, 0.72),
    "flux-schnell": (11_891_178_560, 11_891_178_560, 0.72),
    "z-image": (6_154_908_736, 6_154_908_736, 0.98),
    "sana-600m": (591_747_872, 591_747_872, 0.99),
    "sana-1600m": (1_604_462_752, 1_604_462_752, 0.99),
    "sana-4800m": (4_721_825_952, 4_721_825_952, 0.99),
    "sana-sprint-600m": (593_501_216, 593_501_216, 0.99),
    "sana-sprint-1600m": (1_610_237_472, 1_610_237_472, 0.99),
    "qwen-image": (20_430_401_088, 20_430_401_088, 0.66),
    "flux2-klein-4b": (3_875_544_576, 3_875_544_576, 0.95),
    "flux2-klein-9b": (9_078_581_248, 9_078_581_248, 0.95),
}
UNITS = {"B": 1e9, "M": 1e6}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_as_large_as_published(name: str) -> None:
    network = NETWORKS[name]
    with torch.device("meta"):
        model = network.make()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    in_file = sum(tensor.numel() for tensor in model.state_dict().values())
    *digits, unit = network.published
    number = "".join(digits)
    published, last_digit = float(number) * UNITS[unit], UNITS[unit] / 10 ** len(number.partition(".")[2])
    assert in_file == pytest.approx(published, rel=0.004, abs=last_digit)
    targets = importlib.import_module(f"flashdiff.families.{network.family}").FAMILY.lora_targets
    modules = [module for name, module in model.named_modules() if any(f".{name}".endswith(f".{target}") for target in targets)]
    reached = sum(module.weight.numel() for module in modules) / parameters
    assert (parameters, in_file, pytest.approx(reached, abs=0.015)) == SIZES[name]


def _shapes(network: PublicNetwork, *, is_cut: bool) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in network.make(is_cut=is_cut).state_dict().items()}


def _of_any_block(shapes: dict[str, tuple[int, ...]]) -> set[tuple[str, tuple[int, ...]]]:
    return {(re.sub(r"\.\d+\.", ".N.", key), shape) for key, shape in shapes.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_few_layers_keep_the_width(name: str) -> None:
    """The weights of a network with few layers are weights of the whole one."""
    network = NETWORKS[name]
    whole, cut = (_shapes(network, is_cut=is_cut) for is_cut in (False, True))
    assert network.parameters(is_cut=True) < 1.1e9
    if network.folder == "transformer":
        assert _of_any_block(cut) <= _of_any_block(whole)
    else:
        assert {max(shape) for shape in cut.values()} == {max(shape) for shape in whole.values()}
