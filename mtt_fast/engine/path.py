"""The path of a student, as a tensor for callers of `unroll`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor


class StudentPath(Tensor):
    """A path whose rows `path[n]` are outputs of their own in the graph, and are brought to the device of the student.

    The gradient of a row of an ordinary tensor is as large as the whole path, with zeros in all other rows.
    """

    rows: tuple[Tensor, ...]
    home: torch.device
    # results computed from a path are ordinary tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(path: Tensor, rows: Sequence[Tensor], home: torch.device) -> StudentPath:
        """Return `path` (N + 1, P) with its `rows` (P,), as outputs of autograd, of a student on the device `home`."""
        held = path.as_subclass(StudentPath)
        held.rows, held.home = tuple(rows), home
        return held

    def __getitem__(self, index: Any) -> Tensor:
        chooses_row = isinstance(index, Integral) and not isinstance(index, bool)
        return self.rows[index].to(self.home) if chooses_row else super().__getitem__(index)

    def __reduce_ex__(self, protocol: Any) -> Any:  # a file of a path is a file of an ordinary tensor
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)
