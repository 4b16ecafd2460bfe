"""Offer the kernels' tests one back end after the other, and a number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from mtt_fast.kernels import native


@pytest.fixture(params=[pytest.param("native", marks=pytest.mark.native), "reference"])
def either_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the operations dispatch to one back end of a CPU, then to the other."""
    monkeypatch.setattr(native, "available", request.param == "native")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Return a function that sets torch's number of threads, which is as before after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
