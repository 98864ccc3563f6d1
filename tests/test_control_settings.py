"""The config.json of a control network: a setting of the wrong type is refused by file, name and value."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from tiny import make_tiny_flux, make_tiny_sd3, make_tiny_sd15

from flashdiff.errors import ModelError
from flashdiff.families import family_of
from flashdiff.families.control import check_control

CHECK = Callable[..., str]
MAKE = {"sd15": make_tiny_sd15, "sd3": make_tiny_sd3, "flux": make_tiny_flux}
HEADS: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "ControlNetModel": {
        "block_out_channels": [32, 64], "layers_per_block": 1, "cross_attention_dim": 32,
        "conditioning_embedding_out_channels": [4, 8, 8],
    },
    "T2IAdapter": {"channels": [32, 64], "downscale_factor": 4},
    "SD3ControlNetModel": {**HEADS, "joint_attention_dim": 80, "pooled_projection_dim": 64},
    "FluxControlNetModel": {**HEADS, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 6, 6]},
}  # fmt: skip
"""Those that fit the bases."""
BASE = dict(zip(SETTINGS, ("sd15", "sd15", "sd3", "flux"), strict=True))


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> CHECK:
    """`check_control` of a class with these settings; `of_base` are settings of the base's denoiser."""
    folder = tmp_path_factory.mktemp("bases")
    for name, make in MAKE.items():
        make(folder / name)

    def check(kind: str, *, of_base: dict[str, Any] | None = None, **changes: Any) -> str:
        base, network = folder / BASE[kind], folder / "network"
        family = family_of(base)
        spec, denoiser = family.read_spec(base), base / family.lora_prefix / "config.json"
        network.mkdir(exist_ok=True)
        (network / "config.json").write_text(json.dumps({"_class_name": kind, **SETTINGS[kind], **changes}))
        written = denoiser.read_text()
        denoiser.write_text(json.dumps({**json.loads(written), **(of_base or {})}))
        try:
            return check_control("edges", network, family, base, spec)
        finally:
            denoiser.write_text(written)

    return check


def _case(kind: str, setting: str, value: Any, wanted: str) -> Any:
    return pytest.param(kind, setting, value, wanted, id=f"{kind}-{setting}-{json.dumps(value)}")


@pytest.mark.parametrize(
    ("kind", "setting", "value", "wanted"),
    [
        _case("ControlNetModel", "conditioning_embedding_out_channels", 16, "a list of whole numbers or null"),
        _case("ControlNetModel", "block_out_channels", None, "a list of whole numbers"),
        _case("ControlNetModel", "block_out_channels", [32, "64"], "a list of whole numbers"),
        _case("ControlNetModel", "cross_attention_dim", "32", "a whole number"),
        _case("ControlNetModel", "transformer_layers_per_block", {}, "a whole number or a list of whole numbers"),
        _case("T2IAdapter", "channels", None, "a list of whole numbers"),
        _case("T2IAdapter", "channels", 32, "a list of whole numbers"),
        _case("T2IAdapter", "downscale_factor", "4", "a whole number"),
        _case("T2IAdapter", "downscale_factor", [4], "a whole number"),
        _case("T2IAdapter", "adapter_type", ["full_adapter"], "text"),
        _case("SD3ControlNetModel", "num_attention_heads", None, "a whole number"),
        _case("SD3ControlNetModel", "num_layers", "2", "a whole number"),
        _case("SD3ControlNetModel", "pos_embed_max_size", [96], "a whole number"),
        _case("SD3ControlNetModel", "joint_attention_dim", "80", "a whole number or null"),
        _case("SD3ControlNetModel", "force_zeros_for_pooled_projection", "false", "true or false"),
        _case("FluxControlNetModel", "attention_head_dim", [16], "a whole number"),
        _case("FluxControlNetModel", "num_attention_heads", True, "a whole number"),
        _case("FluxControlNetModel", "num_single_layers", None, "a whole number"),
        _case("FluxControlNetModel", "axes_dims_rope", "4, 6, 6", "a list of whole numbers"),
    ],
)
def test_a_setting_of_the_wrong_type_is_refused(check: CHECK, kind: str, setting: str, value: Any, wanted: str) -> None:
    with pytest.raises(ModelError) as refused:
        check(kind, **{setting: value})
    assert str(refused.value).endswith(f"network/config.json: '{setting}' is {json.dumps(value)}; it must be {wanted}")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {}) for kind in SETTINGS),
        # As published: SDXL's networks have null in the place of false, and heads by level.
        ("ControlNetModel", {"upcast_attention": None, "attention_head_dim": [5, 10], "mid_block_scale_factor": 1}),
        ("ControlNetModel", {"only_cross_attention": [False, False], "norm_num_groups": None}),
        ("SD3ControlNetModel", {"joint_attention_dim": None, "use_pos_embed": False, "pos_embed_type": None}),
        ("FluxControlNetModel", {"num_layers": 0, "num_single_layers": 2, "num_mode": None}),
    ],
)
def test_settings_of_published_networks_are_taken(check: CHECK, kind: str, settings: dict[str, Any]) -> None:
    assert check(kind, **settings) == kind


@pytest.mark.parametrize(
    ("kind", "settings", "counts"),
    [
        ("SD3ControlNetModel", {"num_layers": 0}, "'num_layers' is 0"),
        ("FluxControlNetModel", {"num_layers": 0, "num_single_layers": 0}, "'num_layers' is 0 and 'num_single_layers' is 0"),
    ],
)
def test_a_network_without_blocks_is_refused(check: CHECK, kind: str, settings: dict[str, Any], counts: str) -> None:
    with pytest.raises(ModelError, match=rf"network/config.json: {counts}; one block at least must give residuals"):
        check(kind, **settings)


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [("T2IAdapter", "down_block_types", None), ("FluxControlNetModel", "num_attention_heads", None)],
)
def test_a_base_whose_settings_make_no_sense_is_named(check: CHECK, kind: str, setting: str, value: Any) -> None:
    with pytest.raises(ModelError, match=rf"{BASE[kind]}/\w+/config.json lacks or misstates "):
        check(kind, of_base={setting: value})
