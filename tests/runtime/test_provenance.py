"""Test what a record says of the versions that it was made with."""

from __future__ import annotations

import pytest
import torch

from mtt_fast import InputError, env
from mtt_fast.runtime import provenance
from mtt_fast.runtime.provenance import choose_device, versions


def test_the_version_of_torch_names_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take metadata that leave out the build, as those of PyPI's wheels do."""
    monkeypatch.setattr(provenance, "_installed_version", lambda package: "1.2.3")
    assert versions()["numpy"] == "1.2.3"
    assert versions()["torch"] == torch.__version__


def test_a_driver_that_is_too_old_is_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Take what torch says with such a driver, which itself still counts its GPUs."""

    def fail() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040). Please update it.\nMore."
        )

    for name, value in (("is_available", lambda: False), ("device_count", lambda: 1), ("init", fail)):
        monkeypatch.setattr(torch.cuda, name, value)
    with pytest.raises(
        InputError, match=r"cuda: this machine has 0 usable GPUs \(The NVIDIA driver .* update it\); use"
    ):
        choose_device("cuda")
    assert choose_device("auto") == torch.device("cpu")
    env.main([])
    assert "none: The NVIDIA driver on your system is too old" in capsys.readouterr().out
