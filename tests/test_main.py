"""Test all commands by one name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mtt_fast
from mtt_fast.__main__ import main as all_jobs
from tests.convert.files import distilled


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mtt_fast", *arguments])
    return all_jobs()


def test_all_jobs_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        assert command(monkeypatch, *arguments) == 0
        listed = capsys.readouterr().out
        package = Path(mtt_fast.__file__).parent
        for job in re.findall(r"\n  (\w+) ", listed):
            assert (package / f"{job}.py").exists() or (package / job / "__main__.py").exists()
        runs = 'if __name__ == "__main__"'
        jobs = {path.stem for path in package.glob("*.py") if runs in path.read_text()} - {"__main__"}
        jobs |= {path.parent.name for path in package.glob("*/__main__.py")}
        assert set(re.findall(r"\n  (\w+) ", listed)) == jobs
    assert command(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == mtt_fast.__version__
    assert command(monkeypatch, "destill") == 2
    assert "error: destill: expected one of experts, buffer, distill" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # other tests import the jobs
def test_a_job_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "recipes") == 0
    assert "digits" in capsys.readouterr().out
    distilled().save("run/synthetic.safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "mtt_fast", "convert", "run", "out"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "wrote out/images_best.pt, out/labels_best.pt, out/lr_best.pt" in done.stderr
    assert Path("out/images_best.pt").exists()
    assert command(monkeypatch, "env", "--x") == 2
    assert "error: --x: " in capsys.readouterr().err
