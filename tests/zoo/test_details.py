"""Places of faint attributes, found by drawing a scene without them."""

import numpy as np

from flashdiff.zoo.details import detail_places
from flashdiff.zoo.world import render


def test_places_are_where_a_faint_attribute_is_or_could_be() -> None:
    kinds = ("planets", "moods")
    drawn = [(kind, *render(kind, seed, 64)) for kind in kinds for seed in range(16)]
    images = np.stack([image for _, image, _ in drawn])
    places = detail_places(images, [scene for *_, scene in drawn], 16)
    assert places.shape == (32, 16, 16)
    for (kind, _, scene), place in zip(drawn, places, strict=True):
        share = place.mean()
        assert share == 0 if kind == "moods" else 0 < share < 0.6, (kind, scene, share)
    with_ring = {"ring" in scene.phrases for kind, _, scene in drawn if kind == "planets"}
    assert with_ring == {True, False}
