"""Bundles that cannot be compared are refused."""

from pathlib import Path

import pytest

from benchmarks.timing.bundle_pairs import open_pairs
from flashdiff.errors import BundleError


def test_bundles_that_cannot_be_compared_are_refused(student_bundle: Path, teacher_bundle: Path) -> None:
    with pytest.raises(BundleError, match="not ode and flash"):
        open_pairs([(teacher_bundle, student_bundle)], 1)
    with pytest.raises(BundleError, match="must be built for the same backend"):
        open_pairs([(student_bundle, teacher_bundle)], 1)
