"""Offer the tests a folder with runs on two data sets, and copies of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mtt_fast.commands import cli
from mtt_fast.distill.command import main as distill
from tests.storage.belonging import DISTILLED, EVALUATED, MODEL, TRAINED, save_folder


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory, no_curves: None) -> Path:
    """Make a folder with runs on the digits (run, zrun) and on the image folder pets (prun), with their experts in buffers."""
    root = tmp_path_factory.mktemp("made")
    save_folder(root / "pets", seed=0)
    save_folder(root / "toys", seed=1)
    save_folder(root / "words", seed=2, names=[f"c{digit}" for digit in range(10)])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for out, flags in {"run": ["digits"], "zrun": ["digits", "--zca"], "prun": ["./pets"]}.items():
            words = ["--dataset", *flags, *MODEL, *TRAINED, *DISTILLED, *EVALUATED, "--out", out]
            assert cli.run(distill, words) == 0
    return root


@pytest.fixture
def working_folder(trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a copy of that folder the working directory."""
    shutil.copytree(trained_folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"
