"""Leave the curves out of the runs."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def _without_curves(no_curves: None) -> None:
    pass
