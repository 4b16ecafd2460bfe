"""The tensor that `unroll` returns."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor


class StudentPath(Tensor):
    """A path (N + 1, P) whose `path[n]` is a separate output of the autograd node, on the device of the student.

    With ordinary indexing the gradient of one row would be as large as the whole path, and mostly zeros.
    """

    rows: tuple[Tensor, ...]
    student_device: torch.device
    # operations on a path return ordinary tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def from_rows(path: Tensor, rows: Sequence[Tensor], student_device: torch.device) -> StudentPath:
        """Return `path` (N + 1, P) as a `StudentPath` with these `rows` (P,), for a student on the device `student_device`."""
        student_path = path.as_subclass(StudentPath)
        student_path.rows, student_path.student_device = tuple(rows), student_device
        return student_path

    def __getitem__(self, index: Any) -> Tensor:
        is_row = isinstance(index, Integral) and not isinstance(index, bool)
        return self.rows[index].to(self.student_device) if is_row else super().__getitem__(index)

    def __reduce_ex__(self, protocol: Any) -> Any:  # torch.save writes an ordinary tensor
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)
