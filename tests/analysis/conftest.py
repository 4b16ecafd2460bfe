"""Offer the analyses' tests one toy run."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtt_fast.commands import cli
from mtt_fast.distill.command import main as distill
from tests.analysis.helpers import TOY, folders


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with two toy experts, and a run distilled without augmentation in batches of six of ten images."""
    folder = tmp_path_factory.mktemp("toy")
    flags = [*TOY, *folders(folder), "--syn_steps", "2", "--expert_epochs", "1"]
    assert cli.run(distill, [*flags, "--no_aug", "--batch_syn", "6", "--out", str(folder / "run")]) == 0
    return folder
