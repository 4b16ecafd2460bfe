"""The comparisons that interpret kernels also watch what these load and store; here what such a watch finds."""

from __future__ import annotations

from tests.kernels.triton_comparison import run_part


def test_each_fault_is_named() -> None:
    assert len(run_part("tests.kernels.faulty_kernels", "cpu")) == 11
