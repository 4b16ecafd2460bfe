"""Losses of a student's path: the paper's, ATT's (the nearest step), and PAD's and EDF's (a part of the parameters)."""

from __future__ import annotations

from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mtt_fast.checks import check_ordinary
from mtt_fast.engine.arguments import saveable
from mtt_fast.engine.backward_checks import refuse_forward_mode
from mtt_fast.errors import InputError
from mtt_fast.kernels import squared_distance
from mtt_fast.runtime.cuda_graphs import is_capturing

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # that `squared_distance` takes

_FLATTEN = "torch.nn.utils.parameters_to_vector makes one of a list"

MatchStep = Literal["last", "nearest"]
"""The student's step that is compared with the target: the last, or the one nearest to the target."""


class _SquaredDistance(torch.autograd.Function):
    """|a − b|² accumulated in float64: in float32 a sum over 10⁶ parameters loses three digits."""

    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        distance: Tensor = squared_distance(a.detach().contiguous(), b.detach().contiguous())
        return distance

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        a, b = ctx.saved_tensors
        return 2 * grad.to(a.dtype) * (a - b), None


def matching_loss(end: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """Return `|θ_N − θ*|² / |θ_0 − θ*|²`, the paper's equation 2, as a float64 scalar.

    `end` is the student's `θ_N` (P,), `start` and `target` are the expert's parameters `θ_0` and `θ*` (P,). The gradient flows only to
    `end`, as in the public code. Differences are in the dtype and on the device of `end`, sums in float64.
    Raises `InputError` for vectors that do not fit each other, and, except while a CUDA graph is captured, if the expert did not move.
    """
    return _checked_loss("matching_loss", end, start, target, 0.0)


def masked_matching_loss(end: Tensor, start: Tensor, target: Tensor, loss_ratio: float) -> Tensor:
    """Return `matching_loss` without the parameters of lowest loss, as EDF does, and one of PAD's two scripts.

    The ⌊`loss_ratio` · P⌋ parameters whose `(θ_N − θ*)²` is smallest are dropped from numerator and denominator, and get no
    gradient. `loss_ratio` is in [0, 1). Raises `InputError` as `matching_loss` does.
    """
    _check_ratio("masked_matching_loss loss_ratio", loss_ratio)
    return _checked_loss("masked_matching_loss", end, start, target, loss_ratio)


def nearest_step_loss(path: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """Return `matching_loss` of the step of `path` (N + 1, P) that is nearest to the target, as ATT does.

    The gradient flows only to that row of the path; the choice of the step (`nearest_step`) is a constant. Raises `InputError`
    as `matching_loss` does.
    """
    return matching_loss(path[int(nearest_step(path, target))], start, target)


def nearest_step(path: Tensor, target: Tensor) -> Tensor:
    """Return n () int64 in 1 … N such that row n of `path` (N + 1, P) is nearest to `target` (P,), as ATT chooses it.

    The distance is `Σ |θ_n − θ*|`, accumulated in float64, or infinite for a step that is not finite. Of several nearest steps
    the last is chosen. No tensor is read on the host. Raises `InputError` for tensors that do not fit each other.
    """
    _check_path("nearest_step", path, target)
    _check_vectors("nearest_step", path=path.detach()[0], target=target)
    return _nearest_step(path, target)


def _nearest_step(path: Tensor, target: Tensor) -> Tensor:
    path, target = path.detach(), target.detach().to(path.dtype)
    distances = [(row.to(target.device) - target).abs().sum(dtype=torch.float64) for row in path[1:]]
    return len(distances) - torch.stack(distances[::-1]).nan_to_num(nan=torch.inf, posinf=torch.inf).argmin()


def _relative_distance(end: Tensor, start: Tensor, target: Tensor, loss_ratio: float) -> Tensor:
    """Return `masked_matching_loss` without its checks, so that no tensor is read on the host.

    The loss is not finite if the expert did not move.
    """
    if loss_ratio:
        end, start = _without_lowest(end, start, target, loss_ratio)
    start, target = start.detach().to(end), target.detach().to(end)
    initial_distance = squared_distance(start.contiguous(), target.contiguous())
    return _SquaredDistance.apply(end, saveable(target)) / initial_distance  # type: ignore[no-any-return]


def path_loss(
    path: Tensor,
    start: Tensor,
    target: Tensor,
    match_step: MatchStep = "last",
    loss_ratio: float = 0.0,
    depth_ratio: float = 0.0,
) -> Tensor:
    """Return the matching loss of `path` (N + 1, P) without checks of values, so that no tensor is read on the host.

    With the defaults it is `matching_loss`, with `match_step="nearest"` `nearest_step_loss`, and with `loss_ratio`
    `masked_matching_loss`. The first ⌊`depth_ratio` · P⌋ parameters, those of the first layers, are left out of numerator and
    denominator (PAD); `loss_ratio` is a share of the others. All can be combined. With "nearest" the gradient is as large as the path,
    since the row is selected by a tensor. Raises `InputError` for another `match_step`, for shares outside [0, 1), and for tensors that
    do not fit each other.
    """
    if match_step not in get_args(MatchStep):
        raise InputError(f"path_loss match_step: expected {' or '.join(get_args(MatchStep))}, found {match_step!r}")
    _check_ratio("path_loss loss_ratio", loss_ratio)
    _check_ratio("path_loss depth_ratio", depth_ratio)
    _check_no_transform("path_loss")
    _check_path("path_loss", path, target)
    _check_vectors("path_loss", path=path.detach()[0], start=start, target=target)
    if match_step == "nearest":
        step = _nearest_step(path, target).to(path.device)
        end = path.index_select(0, step.view(1))[0].to(target.device)
    else:
        end = path[-1]
    deep = slice(int(depth_ratio * len(end)), None)
    return _relative_distance(end[deep], start[deep], target[deep], loss_ratio)


def _check_ratio(name: str, ratio: Any) -> None:
    if not (isinstance(ratio, Real) and 0 <= float(ratio) < 1):
        raise InputError(f"{name}: expected at least 0 and less than 1, found {ratio!r}")


def _without_lowest(end: Tensor, start: Tensor, target: Tensor, loss_ratio: float) -> tuple[Tensor, Tensor]:
    """Return `end` and `start`, with the ⌊`loss_ratio` · P⌋ entries of lowest loss replaced by the target's, so that they add zero."""
    start, target = start.detach().to(end), target.detach().to(end)
    order = (end.detach() - target).square().argsort(stable=True)
    dropped = torch.zeros_like(end, dtype=torch.bool).index_fill_(0, order[: int(loss_ratio * len(end))], True)
    return torch.where(dropped, target, end), torch.where(dropped, target, start)


def _checked_loss(name: str, end: Tensor, start: Tensor, target: Tensor, loss_ratio: float) -> Tensor:
    """Return `_relative_distance`. Raises `InputError` for vectors that do not fit, an expert that did not move, and within `torch.func`."""
    _check_no_transform(name)
    _check_vectors(name, end=end, start=start, target=target)
    loss = _relative_distance(end, start, target, loss_ratio)
    if not is_capturing(loss) and not loss.isfinite() and start.to(end).equal(target.to(end)):
        raise InputError(f"{name}: start and target are equal, so the expert did not move between the two epochs")
    return loss


def _check_no_transform(name: str) -> None:
    """Raise `InputError` in a transform of `torch.func`, in which the distance cannot be computed."""
    if torch._C._are_functorch_transforms_active():
        raise InputError(
            f"{name}: found a transform of torch.func, whose tensors the distance cannot read; call without it, and take "
            "derivatives by torch.autograd"
        )


def _check_path(name: str, path: Tensor, target: Tensor) -> None:
    """Raise `InputError` unless `path` is one of at least one step, (N + 1, P), and `target` a vector (P,) that fits it."""
    for argument, tensor in (("path", path), ("target", target)):
        _check_type(name, argument, tensor)
    if path.dim() != 2 or len(path) < 2 or path.shape[1:] != target.shape:
        raise InputError(
            f"{name}: expected a path (N + 1, P) of at least one step and a target (P,), found shapes {tuple(path.shape)} and "
            f"{tuple(target.shape)}"
        )


def _check_vectors(name: str, **vectors: Tensor) -> None:
    """Raise `InputError` unless the `vectors` (P,) are dense and floating, fit each other, and the first has one of `_DTYPES`.

    No value is read.
    """
    for argument, vector in vectors.items():
        _check_type(name, argument, vector)
        if vector.dim() != 1:
            raise InputError(
                f"{name} {argument}: expected a flat vector (P,), found shape {tuple(vector.shape)}; path[-1] is the last row of a path"
            )
    (first_name, first), *others = vectors.items()
    if any(vector.shape != first.shape for _, vector in others):
        found = ", ".join(f"{argument} {tuple(vector.shape)}" for argument, vector in vectors.items())
        raise InputError(
            f"{name}: expected {'three' if len(others) > 1 else 'two'} vectors of one shape, found {found}"
        )
    if first.dtype not in _DTYPES or not all(vector.is_floating_point() for _, vector in others):
        raise InputError(
            f"{name}: expected {first_name} float32, float64 or bfloat16, and {' and '.join(argument for argument, _ in others)} "
            f"floating, found {', '.join(str(vector.dtype) for vector in vectors.values())}; use .float()"
        )
    if any(vector.is_meta != first.is_meta for _, vector in others):
        raise InputError(f"{name}: expected all vectors with numbers, or none, found some on the device meta")


def _check_type(name: str, argument: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name} {argument}: expected a tensor, found {type(tensor).__name__}; {_FLATTEN}")
    check_ordinary(f"{name} {argument}", tensor)
