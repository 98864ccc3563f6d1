"""The shapes of a part's tensors at one bucket: a batch size, and an image size where the part has one."""

from collections.abc import Iterable, Mapping

from flashdiff.components import ModelSpec, Size
from flashdiff.engines.bundle import TensorSpec


def dimensions_of(spec: ModelSpec, size: Size | None, batch: int) -> dict[str, int]:
    """The named dimensions of tensors at one bucket, by name; `size` is None for a part that does not depend on it."""
    if size is None:
        return {"batch": batch}
    _, height, width = spec.latent_shape(size)
    return {"batch": batch, "height": height, "width": width, "image_height": size.height, "image_width": size.width}


def bucket_shapes(tensors: Iterable[TensorSpec], dimensions: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, such as [4, 4, 8, 8] for [batch, 4, height, width], by the tensor's name.

    `dimensions` holds the values of the named axes: rows, and pixels or latent cells.
    """
    return {tensor.name: tensor.shape_for(dimensions) for tensor in tensors}
