"""Test how the comparisons run in the process of a test, as they do on a GPU."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.kernels.triton_comparison import run_here


def test_lines_are_returned_and_warnings_are_no_errors() -> None:
    def compare_part(family: str, part: int, parts: int) -> None:
        warnings.warn("of a library", stacklevel=1)
        print(family, part, parts, torch.get_num_threads())

    threads = torch.get_num_threads()
    assert run_here(compare_part, "norm", 1, 4) == ["norm 1 4 1"]
    assert torch.get_num_threads() == threads


def test_a_failure_is_the_failure_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare_part() -> None:
        raise AssertionError("error of 2")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # the device still answers
    with pytest.raises(AssertionError, match="error of 2"):
        run_here(compare_part)
