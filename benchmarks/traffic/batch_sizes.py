"""The batch size that rows fill without padding."""

from collections.abc import Sequence


def largest_filled(rows: int, batch_sizes: Sequence[int]) -> int:
    """The largest of the rising batch sizes that `rows` fill; the smallest if they fill none."""
    return max([size for size in batch_sizes if size <= rows], default=batch_sizes[0])
