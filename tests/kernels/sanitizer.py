"""Watch what interpreted kernels load and store, as compute-sanitizer does on a GPU: memory of no tensor, and races.

The interpreter runs one program after the other, and each operation whole. On a GPU programs run side by side, and so do a
program's threads: what one thread stores, another one sees only after a barrier.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from torch import Tensor

from tests.kernels.interpreter import quick

Array = np.ndarray[Any, Any]


class Access(NamedTuple):
    """A load or a store: the addresses of its elements, and, sorted, those that are not masked."""

    elements: Array
    addresses: Array

    def meets(self, other: Access) -> bool:
        """Return whether two threads may touch one address. If the elements are the same, so are their threads."""
        if self.addresses[-1] < other.addresses[0] or other.addresses[-1] < self.addresses[0]:
            return False
        if np.array_equal(self.elements, other.elements):
            return False
        return bool(np.isin(self.addresses, other.addresses, assume_unique=True).any())


class Program:
    """What a program loaded, with the number of its stores before, and what it stored: addresses, values as integers."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.loaded: list[tuple[Array, int]] = []
        self.stored: list[tuple[Array, Array]] = []
        self.pending: dict[str, list[Access]] = {"loads": [], "stores": []}  # since the last barrier

    def barrier(self) -> None:
        """Let all threads see what any of them has stored."""
        self.pending = {"loads": [], "stores": []}

    def load(self, access: Access) -> None:
        """Note a load. Raises `AssertionError` if another thread may have stored what is loaded."""
        assert not any(map(access.meets, self.pending["stores"])), "a thread loads what another one stored"
        self.pending["loads"].append(access)
        self.loaded.append((access.addresses, len(self.stored)))

    def store(self, access: Access, values: Array) -> None:
        """Note a store. Raises `AssertionError` if another thread may still have to load, or stored, what was there."""
        assert not any(map(access.meets, self.pending["stores"])), "a thread stores over what another one stored"
        assert not any(map(access.meets, self.pending["loads"])), "a thread stores over what another one loads"
        self.pending["stores"].append(access)
        self.stored.append((access.addresses, values))


class Launch:
    """The programs of a launch of a kernel, on tensors."""

    def __init__(self, tensors: list[Tensor]) -> None:
        bounds = sorted(_bounds(tensor) for tensor in tensors)
        self.begins = np.array([begin for begin, _ in bounds], np.uint64)
        self.ends = np.maximum.accumulate(np.array([end for _, end in bounds], np.uint64))
        self.programs: list[Program] = []

    def access(self, number: int, elements: Array, mask: Array, values: Array | None, size: int) -> None:
        """Note a load, or the store of `values`, of elements of `size` bytes by program `number`. Raises `AssertionError`."""
        if not self.programs or self.programs[-1].number != number:
            self.programs.append(Program(number))
        mask = np.broadcast_to(mask, elements.shape).astype(bool)  # some are numbers
        addresses = elements[mask]
        if not addresses.size:
            return
        addresses, first = np.unique(addresses, return_index=True)
        self._check_bounds(addresses, size)
        access = Access(elements, addresses)
        if values is None:
            self.programs[-1].load(access)
        else:
            assert addresses.size == np.count_nonzero(mask), "two elements are stored to one address"
            stored = np.broadcast_to(values, elements.shape)[mask][first]
            self.programs[-1].store(access, stored.view(f"u{size}").astype(np.uint64))

    def check_programs(self) -> None:
        """Raise `AssertionError` if a program stores what another one loads, or stores with another value."""
        stored = [(program.number, *_last_stored(program)) for program in self.programs if program.stored]
        if not stored:
            return
        owners = np.concatenate([np.full(len(addresses), number) for number, addresses, _ in stored])
        addresses, values = (np.concatenate(each) for each in list(zip(*stored, strict=True))[1:])
        order = np.argsort(addresses, kind="stable")
        owners, addresses, values = owners[order], addresses[order], values[order]
        again = np.flatnonzero(addresses[1:] == addresses[:-1])
        assert (values[again] == values[again + 1]).all(), "two programs store different values to one address"
        for program in self.programs:
            others = addresses[owners != program.number]
            for loaded, before in program.loaded:
                shared = loaded[_contains(others, loaded)]
                if shared.size:
                    own = [stored for stored, _ in program.stored[:before]]
                    assert own, "a program loads what another one stores"
                    assert np.isin(shared, np.concatenate(own)).all(), "a program loads what another one stores"

    def _check_bounds(self, addresses: Array, size: int) -> None:
        tensor = np.searchsorted(self.begins, addresses, side="right")
        inside = (tensor > 0) & (addresses + np.uint64(size) <= self.ends[np.maximum(tensor, 1) - 1])
        assert inside.all(), "memory of no tensor is touched"


@contextmanager
def watched() -> Iterator[None]:
    """Check each launch of the interpreter. Raises `AssertionError`, or the interpreter's error of it, that names kernel and fault.

    Faults are an access to memory of none of the tensors that a kernel is given; an address that one program stores and another
    loads, or stores with another value; and an address that two threads of a program touch with no barrier between, where one stores.
    Which thread has an element is the compiler's choice: it counts as the same only in accesses to the same elements in the same order.
    """
    from triton.runtime import interpreter

    launches: list[Launch] = []
    run, memory, builder = interpreter.GridExecutor.__call__, interpreter._interpreter, interpreter.interpreter_builder

    class WatchedMemory:
        def __getattr__(self, name: str) -> Any:
            return getattr(memory, name)

        def load(self, elements: Array, mask: Array, other: Array, dtype: Any) -> Any:
            launches[-1].access(builder.grid_idx[0], elements, mask, None, np.dtype(dtype).itemsize)
            return memory.load(elements, mask, other, dtype)

        def store(self, elements: Array, values: Array, mask: Array) -> Any:
            launches[-1].access(builder.grid_idx[0], elements, mask, values, values.dtype.itemsize)
            return memory.store(elements, values, mask)

    def run_watched(executor: Any, *arguments: Any, **constants: Any) -> None:
        launches.append(Launch(list(_tensors((arguments, tuple(constants.values()))))))
        try:
            run(executor, *arguments, **constants)
            launches[-1].check_programs()
        except Exception as error:
            error.add_note(f"in kernel {executor.fn.__name__}")
            raise
        finally:
            launches.pop()

    with (
        quick(),
        patch.object(interpreter, "_interpreter", WatchedMemory()),
        patch.object(interpreter.GridExecutor, "__call__", run_watched),
        patch.object(interpreter.InterpreterBuilder, "create_barrier", lambda _: launches[-1].programs[-1].barrier()),
    ):
        yield


def _contains(addresses: Array, some: Array) -> Array:
    """Return which of `some` addresses are among `addresses`, which are sorted."""
    if not len(addresses):
        return np.zeros(len(some), bool)
    return np.asarray(addresses[np.minimum(np.searchsorted(addresses, some), len(addresses) - 1)] == some)


def _last_stored(program: Program) -> tuple[Array, Array]:
    """Return the addresses that a program stored to, each once, and the values that it left there."""
    addresses, values = (np.concatenate(each)[::-1] for each in zip(*program.stored, strict=True))
    addresses, last = np.unique(addresses, return_index=True)
    return addresses, values[last]


def _tensors(arguments: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments, also those in tuples and descriptors."""
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, tuple):
        for each in arguments:
            yield from _tensors(each)
    elif hasattr(arguments, "base"):
        yield from _tensors(arguments.base)


def _bounds(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte and of the byte after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size() * bool(tensor.numel())
