"""The stages of a build, as its output lists them."""

from benchmarks.sizes import stage_seconds


def test_stages_are_read_from_the_output_of_a_build() -> None:
    output = "building because\nfuse       1.5 s  base (sd15)\nexport    20.0 s  denoiser to ONNX\nverify     3.0 s  image"
    assert stage_seconds(output) == {"fuse": 1.5, "export denoiser": 20.0, "verify": 3.0}
