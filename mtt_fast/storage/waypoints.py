"""Expert trajectories as a few waypoints with straight lines between them (MCT).

Zhong et al., "Towards Stable and Storage-efficient Dataset Distillation: Matching Convexified Trajectory", CVPR 2025.
Between the waypoints W_k, at epoch e_k, and W_{k+1} each layer l (one parameter tensor) moves along a straight line

    θ_l(e) = (1 − w_l(e)) W_{k,l} + w_l(e) W_{k+1,l}
    w_l(e) = Σ_{e_k < i ≤ e} |θ_l(i) − θ_l(i−1)| / Σ_{e_k < i ≤ e_{k+1}} |θ_l(i) − θ_l(i−1)|

at the pace of the original expert. Within an epoch w_l is linear, so e may be fractional.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtt_fast.errors import InputError

_ROUNDING = 1e-5  # of positions that were float32


@dataclass(frozen=True)
class Course:
    """The epochs of the K waypoints, and the position of each of L layers between them at every epoch."""

    epochs: tuple[int, ...]
    """e_0 = 0 < e_1 < … of the waypoints; the last is the expert's"""
    sizes: tuple[int, ...]
    """of the layers, P parameters in all"""
    positions: Tensor
    """(epochs + 1, L) float64: k + w_l(e) for e_k ≤ e ≤ e_{k+1}"""
    smooth: bool
    """whether the waypoints are means of their neighbours"""

    def at(self, epoch: float) -> tuple[int, Tensor | None]:
        """Return k and w (P,), float32, at `epoch`; or k and None if waypoint k is there."""
        k = bisect.bisect_right(self.epochs, epoch) - 1
        if self.epochs[k] == epoch:
            return k, None
        whole = math.floor(epoch)
        layers = torch.lerp(self.positions[whole], self.positions[whole + 1], epoch - whole) - k
        return k, layers.float().repeat_interleave(torch.tensor(self.sizes, device="cpu"))

    def to_text(self) -> str:
        """Return the course as JSON."""
        return json.dumps(
            {"epochs": self.epochs, "sizes": self.sizes, "smooth": self.smooth, "positions": self.positions.tolist()}
        )

    @classmethod
    def from_text(cls, text: str) -> Course:
        """Return the course in what `to_text` wrote. Raises `ValueError`, `KeyError` or `TypeError` for anything else."""
        record = json.loads(text)
        positions = torch.tensor(record["positions"], dtype=torch.float64, device="cpu")
        epochs, sizes = tuple(map(int, record["epochs"])), tuple(map(int, record["sizes"]))
        course = cls(epochs, sizes, positions, bool(record["smooth"]))
        course.check()
        return course

    def check(self) -> None:
        """Raise `ValueError` unless the epochs rise, and each layer moves from waypoint to waypoint with them."""
        rising = len(self.epochs) > 1 and self.epochs[0] == 0 and all(a < b for a, b in itertools.pairwise(self.epochs))
        if not rising or self.positions.shape != (self.epochs[-1] + 1, len(self.sizes)):
            raise ValueError("its positions do not fit its epochs")
        steps = self.positions.diff(dim=0)
        if not bool((steps >= -_ROUNDING).all() and (self.positions >= 0).all()):  # NaN is neither
            raise ValueError("its positions are not finite, or fall")


def evenly_spaced(epochs: int, count: int) -> tuple[int, ...]:
    """Return `count` epochs from 0 to `epochs`, evenly spaced and rounded up: 0, 17, 34, 50 for 4 of 50, as in MCT's code.

    MCT's code rounds the distance between them down instead. If epochs are left over, as for 5 of 50, it never matches these.
    """
    if not 2 <= count <= epochs + 1:
        raise InputError(
            f"`num_interpolation` {count}: expected from 2 waypoints (the ends) to the {epochs + 1} saved epochs"
        )
    return tuple(math.ceil(k * epochs / (count - 1)) for k in range(count))


def check_waypoints(epochs: Sequence[int], last: int) -> None:
    """Raise `InputError` unless `epochs` rise from 0 to the `last` one of the expert."""
    if len(epochs) < 2 or list(epochs) != sorted(set(epochs)) or epochs[0] != 0 or epochs[-1] != last:
        raise InputError(
            f"`epochs` {' '.join(map(str, epochs))}: expected rising epochs from 0 to the expert's last, {last}"
        )


def convexified(
    parameters: Tensor, layer_sizes: Sequence[int], epochs: Sequence[int], *, smooth: bool = True
) -> tuple[Tensor, Course]:
    """Return the waypoints (K, P) of a trajectory `parameters` (epochs + 1, P) at `epochs`, and their course.

    `layer_sizes` are the `sizes` of `Course`. With `smooth` a waypoint is the mean of the epochs before and
    after it, and the last that of the last two, as in MCT's code; the first is always the initialisation.
    Raises `InputError` as `check_waypoints` does.
    """
    last = len(parameters) - 1
    check_waypoints(epochs, last)
    # layer by layer, as differences in float64 of the whole trajectory would take four times its memory
    layers = parameters.split(list(layer_sizes), dim=1)
    strides = torch.stack([layer.double().diff(dim=0).norm(dim=1) for layer in layers], dim=1)  # (epochs, layers)
    positions = strides.new_empty(last + 1, len(layer_sizes))
    positions[0] = 0
    for k, (begin, end) in enumerate(itertools.pairwise(epochs)):
        walked = strides[begin:end].cumsum(dim=0)
        evenly = torch.arange(1, end - begin + 1, dtype=torch.float64, device=strides.device) / (end - begin)
        # a layer that does not move, as a bias before a norm, has no pace of its own
        positions[begin + 1 : end + 1] = k + torch.where(walked[-1] > 0, walked / walked[-1], evenly[:, None])
    if smooth:
        around = [(epoch - 1, min(epoch + 1, last)) for epoch in epochs[1:]]
        rows = torch.stack([parameters[0], *((parameters[a] + parameters[b]) / 2 for a, b in around)])
    else:
        rows = parameters[list(epochs)]
    return rows, Course(tuple(epochs), tuple(layer_sizes), positions, smooth)
