"""Capture a function of tensors once in a CUDA graph and replay it, so that the host launches one graph and not thousands of kernels.

On a CPU nothing is captured, and `graphed` returns the function itself. Only `capturer` and `is_capturing` call CUDA.
"""

from __future__ import annotations

import logging
import operator
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mtt_fast.runtime.memory_info import is_out_of_memory

log = logging.getLogger(__name__)

Function = Callable[..., tuple[Tensor, ...]]
"""A pure function of tensors on one device, which reads no tensor's value on the host and draws no random number."""


class CapturedCall(NamedTuple):
    """A captured call: the function that replays it, and the tensors that hold the results afterwards."""

    replay: Callable[[], object]
    outputs: tuple[Tensor, ...]


Capture = Callable[[Callable[[], tuple[Tensor, ...]]], CapturedCall]
"""A function that captures one call of a function without arguments."""

_MAX_CAPTURED = 8  # captured calls of one function, since each keeps its own inputs and outputs
_one_capture = threading.Lock()  # a capture first synchronises the whole device, which breaks any other capture


FirstCall = Callable[[Callable[[], tuple[Tensor, ...]]], object]
"""A function that makes the first of the two warm-up calls before a capture; its results are not used."""


def graphed(
    function: Function, device: torch.device, first_call: FirstCall = operator.call, max_captured: int = _MAX_CAPTURED
) -> Function:
    """Return a function equal to `function` for tensors on `device`; on CUDA it replays a graph.

    `function` must depend on nothing but its arguments and constants. A call with new shapes or dtypes is captured after two
    warm-up calls; `first_call` makes the first of them, and may compile kernels without running them. At most `max_captured` sets
    of shapes and dtypes are captured. Results are new tensors. Raises `torch.OutOfMemoryError` if a capture does not fit on the
    device.
    """
    return GraphedFunction(function, capturer(device, first_call), max_captured) if device.type == "cuda" else function


class GraphedFunction:
    """A function with its captured calls, one for each set of shapes and dtypes of its arguments.

    If there are too many such sets, or a call cannot be captured, the function itself is called, and the log says so.
    """

    def __init__(self, function: Function, capture: Capture, max_captured: int = _MAX_CAPTURED) -> None:
        self._function = function
        self._capture = capture
        self._max_captured = max_captured
        self._captured: dict[tuple[object, ...], tuple[tuple[Tensor, ...], CapturedCall]] = {}
        self._one_call = threading.Lock()  # one call at a time: another thread would overwrite the static inputs
        self.problem: str | None = None
        """the reason why calls are not captured; None while they are"""

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the function's results for `inputs`. Within a capture by the caller, the function itself is called and captured."""
        if any(map(is_capturing, inputs)):
            return self._function(*inputs)
        with self._one_call:
            return self._called(*inputs)

    def _called(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        kind = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if kind not in self._captured and self.problem is None:
            self._add(kind, inputs)
        if kind not in self._captured:
            return self._function(*inputs)
        static_inputs, captured = self._captured[kind]
        for static_input, tensor in zip(static_inputs, inputs, strict=True):
            static_input.copy_(tensor, non_blocking=True)
        captured.replay()
        return tuple(output.clone() for output in captured.outputs)  # the next replay overwrites them

    def _add(self, kind: tuple[object, ...], inputs: tuple[Tensor, ...]) -> None:
        if len(self._captured) == self._max_captured:
            self._give_up(f"more than {self._max_captured} sets of shapes")
            return
        static_inputs = tuple(tensor.detach().clone() for tensor in inputs)
        try:
            self._captured[kind] = static_inputs, self._capture(lambda: self._function(*static_inputs))
            return
        except RuntimeError as error:
            out_of_memory, cause = _out_of_memory(error), _cause(error)
        # after the except clause, where the error and the tensors of its frames are gone
        if out_of_memory:
            raise torch.OutOfMemoryError(out_of_memory)
        self._give_up(cause)

    def _give_up(self, problem: str) -> None:
        self.problem = problem
        log.warning("not captured in a CUDA graph, so that it runs slower, with the same result: %s", problem)


def is_capturing(tensor: Tensor) -> bool:
    """Return whether work on `tensor` is being captured in a CUDA graph, so that the host must not synchronise."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def capturer(device: torch.device, first_call: FirstCall) -> Capture:
    """Return a function that captures calls in CUDA graphs on `device`, each after `first_call` and a second warm-up call.

    The graphs of one capturer share memory, so only one of them may run at a time, on one stream after another.
    """
    with torch.cuda.device(device):
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def capture(run: Callable[[], tuple[Tensor, ...]]) -> CapturedCall:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), _one_capture:
            before = torch.cuda.current_stream()
            stream.wait_stream(before)
            with torch.cuda.stream(stream):  # also restores the old stream if a capture fails
                first_call(run)  # compiles kernels, chooses algorithms
                run()  # loads the kernels; runs as all later calls do
                # thread_local: a thread that prefetches may meanwhile call CUDA freely
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    outputs = run()
            before.wait_stream(stream)
        return CapturedCall(graph.replay, outputs)

    return capture


def _cause(error: RuntimeError) -> str:
    """Return the first line of the error that led to `error`: an interrupted capture raises one that hides the cause."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _out_of_memory(error: BaseException | None) -> str | None:
    """Return the message of the out-of-memory error that caused `error`, or None; an interrupted capture hides the cause."""
    while error is not None:
        if is_out_of_memory(error):
            return str(error)
        error = error.__cause__ or error.__context__
    return None
