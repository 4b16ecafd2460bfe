"""The layout of a network's parameters in one flat vector."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from mtt_fast.errors import InputError


@dataclass(frozen=True)
class ParameterLayout:
    """Names and shapes in the order of the flat vector, which is the order of `module.parameters()`."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """Return the number of scalars of each parameter."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def num_parameters(self) -> int:
        """Return P, the length of the flat vector."""
        return sum(self.sizes)

    def split(self, theta: Tensor) -> list[Tensor]:
        """Return the parameters as views into `theta` (P,). Raises `InputError` for another length."""
        if theta.shape != (self.num_parameters,):
            raise InputError(
                f"theta: expected a flat vector of shape ({self.num_parameters},), found {tuple(theta.shape)}; "
                "is it of another network?"
            )
        pieces = theta.split(self.sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        """Return the parameters as `split` does, by name."""
        return dict(zip(self.names, self.split(theta), strict=True))

    def describe(self) -> str:
        """Return the layout as text, `name:2x3x3x3;name:2;…`: two networks agree where these strings do."""
        return ";".join(
            f"{name}:{'x'.join(map(str, shape))}" for name, shape in zip(self.names, self.shapes, strict=True)
        )

    @classmethod
    def from_text(cls, text: str) -> ParameterLayout:
        """Return the layout in what `describe` returned. Raises `ValueError` for anything else."""
        entries = [entry.rpartition(":") for entry in text.split(";")]
        shapes = (tuple(int(side) for side in shape.split("x") if side) for _, _, shape in entries)
        return cls(tuple(name for name, _, _ in entries), tuple(shapes))
