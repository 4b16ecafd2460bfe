"""Test the entry of `python -m mtt_fast.analysis`: its list of analyses, and mistyped ones."""

from __future__ import annotations

import pytest

from mtt_fast.analysis.__main__ import COMMANDS
from tests.analysis.helpers import run


def test_commands_are_told_and_mistyped_ones_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    told = capsys.readouterr().out
    assert all(name in told for name in COMMANDS)
    assert run("gird") == 2
    assert "gird: no such analysis (did you mean grid?)" in capsys.readouterr().err
