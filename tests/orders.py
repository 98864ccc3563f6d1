"""Orders for tests."""

from dataclasses import replace

from flashdiff.orders import Order, Pixels
from flashdiff.tasks import image_to_image


def from_image(order: Order, image: Pixels, strength: float = 0.8) -> Order:
    """The order, started from an image."""
    return replace(order, task=image_to_image.TASK, inputs={"image": image}, parameters={"strength": strength})
