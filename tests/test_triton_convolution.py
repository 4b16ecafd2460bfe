"""Triton's convolutions, classifier, vector and image kernels against their definition: interpreted, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: it comes for Linux alone")

PROGRAM = Path(__file__).with_name("triton_comparison.py")


def compare(device: str, **environment: str) -> list[str]:
    answer = subprocess.run(
        [sys.executable, str(PROGRAM), device],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.splitlines()


@pytest.mark.slow
def test_equal_the_definition_interpreted() -> None:
    lines = compare("cpu", TRITON_INTERPRET="1")
    assert len([line for line in lines if line.startswith("refused: expected")]) == 3
    for operation in ("dual", "dual_input_gradient", "tangent", "input_gradient_tangent", "dual_weight_gradient"):
        for dtype in ("float32", "float64"):
            assert any(f"'conv3x3_{operation}'" in line and dtype in line for line in lines)
    for operation in ("linear_cross_entropy", "linear_cross_entropy_dual"):
        assert len([line for line in lines if f"'{operation}'" in line]) == 2 * 4 * 3  # dtypes, shapes, kinds of labels
    assert len([line for line in lines if "'colour_warp_mask" in line]) == 4 * 3 * 2


@pytest.mark.gpu
def test_equal_the_definition_on_a_gpu() -> None:
    lines = compare("cuda", TRITON_INTERPRET="0")
    for precision in ("fp32", "tf32", "bf16"):
        assert any(f"'{precision}'" in line for line in lines)


def test_importing_needs_no_triton() -> None:
    """An operation that is asked for does, and says so."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from mtt_fast.kernels import triton as operations\n"
        "try:\n    operations.conv3x3_dual\n"
        "except ImportError as error:\n    print(error)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "need Triton" in answer.stdout
