"""Count the bytes of the live tensors in a step on meta tensors, without computing it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtt_fast.engine.students.protocol import StepBytes, Student
from mtt_fast.errors import InputError
from mtt_fast.networks.protocol import Network
from mtt_fast.runtime.numerics import without_saved_tensor_hooks
from mtt_fast.user_code import line_of

_Bytes = TypeVar("_Bytes", int, StepBytes)
_COUNTED: weakref.WeakKeyDictionary[Network, dict[Any, Any]] = weakref.WeakKeyDictionary()
"""Cache of the counts, for which an evaluation asks for each network of a pool. An entry lives as long as its network."""


def live_bytes(
    network: Network, student: Student, batch: int, image_shape: torch.Size, dtype: torch.dtype
) -> StepBytes:
    """Return the bytes of the live tensors in steps of a `student` of `network`, at their peaks and between the sweeps.

    Nothing is computed: the steps run on the meta device. Results are cached by network, not by `student`, so all students of a
    network must take the same memory. Raises `InputError` for a network that does not run on the meta device, and for one that
    cannot be a key of the cache.
    """
    return _cached(_counted_live_bytes, network, student, batch, image_shape, dtype)


def gradient_live_bytes(
    network: Network, student: Student, batch: int, image_shape: torch.Size, dtype: torch.dtype
) -> int:
    """Return `live_bytes(…).gradient`, several times sooner, since only the gradient is run."""
    return _cached(_counted_gradient_live_bytes, network, student, batch, image_shape, dtype)


def _cached(
    count: Callable[..., _Bytes],
    network: Network,
    student: Student,
    batch: int,
    image_shape: torch.Size,
    dtype: torch.dtype,
) -> _Bytes:
    try:
        known = _COUNTED.setdefault(network, {})
    except TypeError as error:
        raise InputError(
            f"`net`: expected a hashable network with weak references, by which the memory of its steps is cached, found {error}; "
            "make a dataclass with eq=False, or leave `memory_budget` out"
        ) from error
    key = (count, batch, image_shape, dtype)
    if key not in known:
        try:
            with torch.autograd.set_detect_anomaly(False):  # anomaly detection reads values, to find NaN
                known[key] = count(network, student, batch, image_shape, dtype)
        except (RuntimeError, TypeError) as error:  # a TypeError of `.numpy()`
            raise InputError(
                "`net`: expected a network that runs with any batch size on meta tensors, without data, by which the memory of a step is counted, "
                f"found {str(error).partition(chr(10))[0]!r}{line_of(error)} for images {tuple(image_shape)}; make its tensors on the device of the images, or "
                "dense buffers of a module, and read no tensor's value in it; only a `memory_budget` needs the count"
            ) from error
    counted: _Bytes = known[key]
    return counted


def output_bytes(network: Network, batch: int, image_shape: torch.Size, dtype: torch.dtype) -> int:
    """Return the bytes of the outputs of a `network` for a batch. Nothing is computed, as in `live_bytes`."""
    theta = torch.empty(network.num_parameters, dtype=dtype, device="meta")
    with torch.no_grad():
        return network(theta, torch.empty((batch, *image_shape), dtype=dtype, device="meta")).nbytes


@without_saved_tensor_hooks()
def _counted_gradient_live_bytes(
    network: Network, student: Student, batch: int, image_shape: torch.Size, dtype: torch.dtype
) -> int:
    theta, images, labels = _meta_batch(network, batch, image_shape, dtype)
    counted = CountLiveBytes()
    with counted:
        student.gradient(theta, images, labels)
    return counted.peak


@without_saved_tensor_hooks()
def _counted_live_bytes(
    network: Network, student: Student, batch: int, image_shape: torch.Size, dtype: torch.dtype
) -> StepBytes:
    gradient = gradient_live_bytes(network, student, batch, image_shape, dtype)
    theta, images, labels = _meta_batch(network, batch, image_shape, dtype)
    with CountLiveBytes() as gradient_jvp:
        student.gradient_jvp(theta, images, labels, torch.empty_like(theta))
    with CountLiveBytes() as saving:
        step = student.gradient(theta, images, labels, save=True)
        saved, forward_peak = saving.live, saving.peak
        saving.peak = saved
        student.gradient_jvp(theta, images, labels, torch.empty_like(theta), step.saved)
    return StepBytes(
        gradient=gradient,
        gradient_saving=forward_peak,
        gradient_jvp=gradient_jvp.peak,
        gradient_jvp_saved=saving.peak - saved,
        saved=saved,
        workspace=0,
    )


def _meta_batch(
    network: Network, batch: int, image_shape: torch.Size, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return parameters, images and labels on the meta device."""
    theta = torch.empty(network.num_parameters, dtype=dtype, device="meta")
    images = torch.empty((batch, *image_shape), dtype=dtype, device="meta")
    return theta, images, torch.empty(batch, dtype=torch.long, device="meta")


class CountLiveBytes(TorchDispatchMode):
    """Track the bytes of the tensors that operations allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.live = 0
        self._storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and not func.is_view:
                self._allocated(tensor.untyped_storage())
        return result

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._storages:
            self._storages.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.live -= size
