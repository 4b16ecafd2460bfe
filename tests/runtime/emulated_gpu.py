"""Run modules on a CUDA device that is not there: `python -m tests.runtime.emulated_gpu`, then a line for each on the input.

Tensors on "cuda" hold tensors of the CPU, with which torch computes; ConvNet's fused step takes the reference in place of Triton's kernels.
What a GPU would refuse is an error: operands on two devices, an operation without a deterministic implementation, and a wait in a
capture. A line is a JSON list of two files, OUTPUT and REPORT, a module, and its arguments. REPORT (JSON) lists the waits of
the host, each with the lines of this project that led to it. The process needs the library of emulated_gpu.cpp, see
tests/runtime/test_emulated_gpu.py.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from mtt_fast.runtime.dispatch_mode import DispatchMode

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GIB = 2**30

WAITING = frozenset(
    "_local_scalar_dense item is_nonzero equal nonzero masked_select _unique2 unique_dim unique_consecutive bincount tolist".split()
)
"""Operations that the host waits for, to read a value or to learn a shape."""
NOT_DETERMINISTIC = frozenset(
    "_adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward _ctc_loss_backward adaptive_max_pool2d_backward avg_pool3d_backward "
    "cumsum fractional_max_pool2d_backward fractional_max_pool3d_backward grid_sampler_2d_backward grid_sampler_3d_backward histc "
    "kthvalue max_pool3d_with_indices_backward max_unpool2d max_unpool3d median nll_loss2d_backward nll_loss2d_forward put_ "
    "reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward replication_pad1d_backward "
    "replication_pad2d_backward replication_pad3d_backward scatter_reduce upsample_bicubic2d_backward upsample_bilinear2d_backward "
    "upsample_linear1d_backward upsample_trilinear3d_backward".split()
)
"""Operations that raise on CUDA where torch is told to be deterministic; `cumsum` of whole numbers does not."""
VIEWS_OF_INDICES = frozenset("index index_put index_put_ _index_put_impl_ _unsafe_index _unsafe_index_put".split())


class Refused(RuntimeError):
    """Says what a GPU would refuse."""


class Log:
    """Collects what the host waited for, and what was refused."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.refused: list[str] = []
        self._states = threading.local()

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Refuse waits of this thread within the block, as while a graph is captured or replayed."""
        self._states.is_capturing = True
        try:
            yield
        finally:
            self._states.is_capturing = False

    @property
    def is_capturing(self) -> bool:
        """Return whether this thread captures a graph."""
        return getattr(self._states, "is_capturing", False)

    def wait(self, name: str) -> None:
        """Note a wait."""
        if self.is_capturing:
            self.refuse(f"operation not permitted when stream is capturing: {name}")
        self.waits.append(f"{name}: {_here()}")

    def refuse(self, reason: str) -> None:
        """Note and raise what a GPU refuses."""
        self.refused.append(f"{reason}: {_here()}")
        raise Refused(reason)


LOG = Log()


def _here() -> str:
    """Return the lines of this project that led here, the last one first."""
    # an environment may lie within the project, as README's does
    frames = [
        frame
        for frame in traceback.extract_stack()
        if frame.filename.startswith(str(ROOT)) and "site-packages" not in frame.filename
    ]
    names = [f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno} {frame.name}" for frame in frames]
    return " < ".join(reversed([name for name in names if "emulated_gpu.py" not in name]))


class OnCuda(Tensor):
    """A tensor on the device that is not there."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(held: Tensor) -> OnCuda:
        """Return the tensor on the device that holds `held` of the CPU."""
        tensor: OnCuda = Tensor._make_wrapper_subclass(
            OnCuda,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=CUDA,
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _computed(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        """See `Tensor.data`."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, OnCuda)
        self.held = value.held

    def __getitem__(self, index: Any) -> Tensor:  # of a path, which cannot be of two subclasses
        rows = vars(self).get("rows")
        return super().__getitem__(index) if rows is None or not isinstance(index, int) else rows[index]


class Device(DispatchMode):
    """Compute what concerns the device that is not there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")) or any(isinstance(each, OnCuda) for each in _leaves(args, kwargs)):
            return _computed(func, args, kwargs)
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _leaves(args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments of an operation, with those in lists one by one. `tree_leaves` takes most of the time of a test."""
    every = (*args, *kwargs.values())
    return [leaf for each in every for leaf in (each if isinstance(each, (list, tuple)) else (each,))]


def _map_tensors(function: Callable[[Any], Any], value: Any) -> Any:
    """Return `value`, a tensor or a list of some or another argument, with `function` of each tensor."""
    if isinstance(value, (list, tuple)):
        return type(value)([_map_tensors(function, each) for each in value])
    return function(value) if isinstance(value, Tensor) else value


def _held(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, OnCuda) else tensor


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute `func` on the CPU, after the checks."""
    name, device = func.overloadpacket.__name__, kwargs.get("device")
    leaves = _leaves(args, kwargs)
    tensors = [each for each in leaves if isinstance(each, Tensor)]
    on_cuda = [each for each in tensors if isinstance(each, OnCuda)]
    if on_cuda or name == "_to_copy":
        _check(name, args, kwargs, [each for each in tensors if not isinstance(each, OnCuda)])
    if any(isinstance(each, torch.Generator) for each in leaves):
        LOG.refuse(f"{name} by a generator of the CPU")
    held_args = [_map_tensors(_held, each) for each in args]
    held_kwargs = {key: _map_tensors(_held, each) for key, each in kwargs.items()}
    if _is_cuda(device):
        held_kwargs["device"] = CPU
    result = func(*held_args, **held_kwargs)
    if name == "copy_":
        return args[0]
    if name == "_to_copy" and result is held_args[0]:
        result = result.clone()
    if not (_is_cuda(device) if device is not None else on_cuda):
        return result
    results = _map_tensors(lambda each: OnCuda.of(each) if each.device == CPU else each, result)
    return return_and_correct_aliasing(func, args, kwargs, results) if on_cuda else results


def _check(name: str, args: Any, kwargs: Any, others: list[Tensor]) -> None:
    """Note the wait of an operation on CUDA tensors and `others`, and refuse what a GPU would."""
    if name in WAITING:
        LOG.wait(name)
    whole = name == "cumsum" and not args[0].is_floating_point()
    if name in NOT_DETERMINISTIC and torch.are_deterministic_algorithms_enabled() and not whole:
        LOG.refuse(f"{name} is not deterministic")
    if name in ("copy_", "_to_copy"):
        _check_copy(name, args, kwargs)
    elif name in VIEWS_OF_INDICES:
        indices = [each for each in args[1] if isinstance(each, Tensor)]
        if any(each.dtype == torch.bool or not isinstance(each, OnCuda) for each in indices):
            LOG.wait(f"{name} by a mask or by host indices")
    elif any(each.dim() or name in ("cat", "stack") for each in others):
        LOG.refuse(f"{name} on {sorted({str(each.device) for each in others} | {'cuda:0'})}")


def _check_copy(name: str, args: Any, kwargs: Any) -> None:
    """Note the wait of a copy between host and device, unless it only starts: from or to pinned memory."""
    source, target = (args[1], args[0]) if name == "copy_" else (args[0], None)
    device = torch.device(kwargs.get("device") or source.device) if target is None else target.device
    if device.type != source.device.type and device.type != "meta":
        only_starts = kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))
        pinned = any(hasattr(each, "is_pinned_here") for each in (source, target))
        if not (only_starts and pinned):
            LOG.wait(f"{name} from {source.device.type} to {device.type}")


class Stream:
    """A stream, or an event on it: all is done when it is asked for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def nothing(self, *_: Any) -> None:
        """Do nothing."""

    wait_stream = wait_event = nothing

    def record_event(self, *_: Any) -> Stream:
        """Return an event."""
        return self

    def synchronize(self) -> None:
        """Note a wait."""
        LOG.wait("synchronize")


def _pinned(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.is_pinned_here = True  # type: ignore[attr-defined]
    return copy


def capturer(device: torch.device, first_call: Callable[..., object] | None = None) -> Callable[..., Any]:
    """Return what `mtt_fast.runtime.cuda_graphs.capturer` does, for a device that cannot capture: a replay computes again."""
    from mtt_fast.runtime.cuda_graphs import CapturedCall

    def capture(run: Callable[[], tuple[Tensor, ...]]) -> CapturedCall:
        if LOG.is_capturing:
            LOG.refuse("a capture within a capture")
        run()
        run()
        with LOG.capturing():
            outputs = run()

        def replay() -> None:
            with LOG.capturing():
                results = run()
            for place, value in zip(outputs, results, strict=True):
                place.copy_(value)

        return CapturedCall(replay, outputs)

    return capture


@contextlib.contextmanager
def emulated() -> Iterator[Log]:
    """Make this process believe in the device within the block; the log of it is yielded."""
    from mtt_fast.engine.path import StudentPath
    from mtt_fast.engine.students import choice
    from mtt_fast.kernels import checks, dispatch
    from mtt_fast.runtime import cuda_graphs

    def path_of(path: Tensor, rows: Any, home: torch.device) -> Any:
        if not isinstance(path, OnCuda):
            return original_path(path, rows, home)
        path.rows, path.home = tuple(rows), home  # type: ignore[attr-defined]
        return path

    def tolist(tensor: Tensor) -> Any:
        if isinstance(tensor, OnCuda):
            LOG.wait("tolist")
            return tensor.held.tolist()
        return original_tolist(tensor)

    def empty(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        tensor = original_empty(*size, **options)
        return _pinned(tensor) if pin_memory else tensor

    def run_thread(thread: threading.Thread) -> None:
        with Device():  # a mode is one thread's
            original_run(thread)

    original_path, original_tolist, original_empty = StudentPath.from_rows, Tensor.tolist, torch.empty
    original_run, stream = threading.Thread.run, Stream()
    properties = SimpleNamespace(
        name="none", major=9, minor=0, multi_processor_count=132, max_threads_per_multi_processor=2048
    )
    nothing, zero, context = lambda *_: None, lambda *_: 0, lambda *_: contextlib.nullcontext()
    of_cuda: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": zero, "is_initialized": lambda: True,
        "get_device_name": lambda *_: "none", "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties, "mem_get_info": lambda *_: (6 * GIB, 8 * GIB),
        "memory_reserved": zero, "memory_allocated": zero, "max_memory_allocated": zero,
        "reset_peak_memory_stats": nothing, "empty_cache": nothing, "synchronize": lambda *_: LOG.wait("synchronize"),
        "Stream": Stream, "Event": Stream, "current_stream": lambda *_: stream, "stream": context, "device": context,
        "is_current_stream_capturing": lambda: LOG.is_capturing, "default_generators": (torch.Generator(),),
        "CUDAGraph": Stream, "graph": lambda *_: LOG.capturing(),
    }  # fmt: skip
    with contextlib.ExitStack() as patches:
        for owner, replaced in (
            (torch.cuda, of_cuda),
            (Tensor, {"tolist": tolist, "pin_memory": _pinned, "record_stream": nothing}),
            (torch, {"empty": empty}),
            (threading.Thread, {"run": run_thread}),
            (StudentPath, {"from_rows": staticmethod(path_of)}),
            (checks, {"_has_memory": lambda tensor: True}),  # the reference computes with what a tensor holds
            (dispatch, {"_runs_triton": lambda device: False}),
            (choice, {"has_kernels": lambda device: True}),
            (cuda_graphs, {"capturer": capturer}),
        ):
            for name, value in replaced.items():
                patches.enter_context(patch.object(owner, name, value))
        swaps = torch.__future__.get_swap_module_params_on_conversion()  # else `Module.to` loses what a tensor holds
        torch.__future__.set_swap_module_params_on_conversion(True)
        patches.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        torch._C._set_only_lift_cpu_tensors(True)
        patches.callback(torch._C._set_only_lift_cpu_tensors, False)
        patches.enter_context(Device())
        yield LOG


def main(report: str, module: str, *arguments: str) -> None:
    """Run `module` with `arguments` on the device, and write the report."""
    sys.argv = [module, *arguments]
    status: Any = 0
    with emulated() as log:
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code
        finally:
            Path(report).write_text(json.dumps({"status": status, "waits": log.waits, "refused": log.refused}))


def serve() -> None:
    """Run the module of each line in a copy of this process, and print its exit status: imports take longer than most runs."""
    for name in (
        "mtt_fast.distill.command",
        "matplotlib.figure",
        "tensorboard.summary.writer.record_writer",
    ):
        importlib.import_module(name)
    for line in sys.stdin:
        output, *words = json.loads(line)
        child = os.fork()
        if child == 0:
            with open(output, "w") as file:
                for stream in (sys.stdout, sys.stderr):
                    os.dup2(file.fileno(), stream.fileno())
            return main(*words)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
