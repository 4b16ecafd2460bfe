"""Count the bytes of the live tensors in a step on meta tensors, without computing it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from mtt_fast.engine.students.protocol import StepBytes, Student
from mtt_fast.errors import InputError
from mtt_fast.networks.protocol import Network
from mtt_fast.runtime.dispatch_mode import DispatchMode
from mtt_fast.runtime.numerics import without_saved_tensor_hooks
from mtt_fast.user_code import line_of

_Shapes = tuple[int, torch.Size, torch.dtype]
_LIVE_BYTES: weakref.WeakKeyDictionary[Network, dict[_Shapes, StepBytes]] = weakref.WeakKeyDictionary()
"""Cache of `live_bytes`, which an evaluation calls for each network of a pool. An entry lives as long as its network."""


def live_bytes(
    network: Network, student: Student, batch: int, image_shape: torch.Size, dtype: torch.dtype
) -> StepBytes:
    """Return the bytes of the live tensors in steps of a `student` of `network`, at their peaks and between the sweeps.

    Nothing is computed: the steps run on the meta device. Results are cached by network, not by `student`, so all students of a
    network must take the same memory. Raises `InputError` for a network that does not run on the meta device, and for one that
    cannot be a key of the cache.
    """
    try:
        known = _LIVE_BYTES.setdefault(network, {})
    except TypeError as error:
        raise InputError(
            f"`net`: expected a hashable network with weak references, by which the memory of its steps is cached, found {error}; "
            "make a dataclass with eq=False, or leave `memory_budget` out"
        ) from error
    shapes = (batch, image_shape, dtype)
    if shapes not in known:
        try:
            with torch.autograd.set_detect_anomaly(False):  # anomaly detection reads values, to find NaN
                known[shapes] = _counted_live_bytes(network, student, *shapes)
        except (RuntimeError, TypeError) as error:  # a TypeError of `.numpy()`
            raise InputError(
                "`net`: expected a network that runs with any batch size on meta tensors, without data, by which the memory of a step is counted, "
                f"found {str(error).partition(chr(10))[0]!r}{line_of(error)} for images {tuple(image_shape)}; make its tensors on the device of the images, or "
                "dense buffers of a module, and read no tensor's value in it; only a `memory_budget` needs the count"
            ) from error
    return known[shapes]


def output_bytes(network: Network, batch: int, image_shape: torch.Size, dtype: torch.dtype) -> int:
    """Return the bytes of the outputs of a `network` for a batch. Nothing is computed, as in `live_bytes`."""
    theta = torch.empty(network.num_parameters, dtype=dtype, device="meta")
    with torch.no_grad():
        return network(theta, torch.empty((batch, *image_shape), dtype=dtype, device="meta")).nbytes


@without_saved_tensor_hooks()
def _counted_live_bytes(
    network: Network, student: Student, batch: int, image_shape: torch.Size, dtype: torch.dtype
) -> StepBytes:
    theta = torch.empty(network.num_parameters, dtype=dtype, device="meta")
    images = torch.empty((batch, *image_shape), dtype=dtype, device="meta")
    labels = torch.empty(batch, dtype=torch.long, device="meta")
    with CountLiveBytes() as gradient:
        student.gradient(theta, images, labels)
    with CountLiveBytes() as gradient_jvp:
        student.gradient_jvp(theta, images, labels, torch.empty_like(theta))
    with CountLiveBytes() as saving:
        step = student.gradient(theta, images, labels, save=True)
        saved, forward_peak = saving.live, saving.peak
        saving.peak = saved
        student.gradient_jvp(theta, images, labels, torch.empty_like(theta), step.saved)
    return StepBytes(
        gradient=gradient.peak,
        gradient_saving=forward_peak,
        gradient_jvp=gradient_jvp.peak,
        gradient_jvp_saved=saving.peak - saved,
        saved=saved,
        workspace=0,
    )


class CountLiveBytes(DispatchMode):
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
