"""Test what a record says of the versions that it was made with."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

from mtt_fast.runtime.provenance import versions


def test_the_version_of_torch_names_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take metadata that leave out the build, as those of PyPI's wheels do."""
    monkeypatch.setattr(metadata, "version", lambda package: "1.2.3")
    assert versions()["numpy"] == "1.2.3"
    assert versions()["torch"] == torch.__version__
