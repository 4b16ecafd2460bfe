"""Run kernels with one fault each, interpreted, and check that sanitizer.py names it: `python -m tests.kernels.faulty_kernels cpu`."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch

from mtt_fast.kernels.triton.launch import tl, triton
from tests.kernels.sanitizer import watched

HALF = 16  # elements of a program; a launch has two, and memory for both


@triton.jit
def own(x: tl.tensor, HALF: tl.constexpr) -> None:
    place = tl.program_id(0) * HALF + tl.arange(0, HALF)
    tl.store(x + place, tl.load(x + place) + 1)


@triton.jit
def behind_a_barrier(x: tl.tensor, HALF: tl.constexpr) -> None:
    x += tl.program_id(0) * HALF
    place = tl.arange(0, HALF)
    tl.store(x + place, place.to(tl.float32))
    tl.debug_barrier()
    reversed_order = tl.load(x + (HALF - 1 - place))
    tl.debug_barrier()
    tl.store(x + place, reversed_order)


@triton.jit
def masked(x: tl.tensor, HALF: tl.constexpr) -> None:
    place = tl.program_id(0) * HALF + tl.arange(0, HALF)
    tl.load(x + place + 1, place < 2 * HALF - 1, 0)


@triton.jit
def equal_values(x: tl.tensor, HALF: tl.constexpr) -> None:
    tl.store(x + tl.arange(0, HALF), 1.0)


@triton.jit
def past_the_end(x: tl.tensor, HALF: tl.constexpr) -> None:
    tl.load(x + tl.program_id(0) * HALF + tl.arange(0, HALF) + 1)


@triton.jit
def before_the_beginning(x: tl.tensor, HALF: tl.constexpr) -> None:
    tl.store(x + tl.program_id(0) * HALF + tl.arange(0, HALF) - 1, 0.0)


@triton.jit
def loads_from_another_thread(x: tl.tensor, HALF: tl.constexpr) -> None:
    x += tl.program_id(0) * HALF
    place = tl.arange(0, HALF)
    tl.store(x + place, place.to(tl.float32))
    tl.load(x + (HALF - 1 - place))


@triton.jit
def stores_over_another_thread(x: tl.tensor, HALF: tl.constexpr) -> None:
    x += tl.program_id(0) * HALF
    place = tl.arange(0, HALF)
    tl.store(x + (HALF - 1 - place), tl.load(x + place))


@triton.jit
def stores_twice(x: tl.tensor, HALF: tl.constexpr) -> None:
    tl.store(x + tl.program_id(0) * HALF + tl.arange(0, HALF) // 2, 1.0)


@triton.jit
def loads_from_another_program(x: tl.tensor, HALF: tl.constexpr) -> None:
    place = tl.arange(0, HALF)
    tl.load(x + (1 - tl.program_id(0)) * HALF + place)
    tl.debug_barrier()
    tl.store(x + tl.program_id(0) * HALF + place, 1.0)


@triton.jit
def differs_from_another_program(x: tl.tensor, HALF: tl.constexpr) -> None:
    tl.store(x + tl.arange(0, HALF), tl.program_id(0).to(tl.float32))


FAULTS = {
    own: None,
    behind_a_barrier: None,
    masked: None,
    equal_values: None,
    past_the_end: "memory of no tensor is touched",
    before_the_beginning: "memory of no tensor is touched",
    loads_from_another_thread: "a thread loads what another one stored",
    stores_over_another_thread: "a thread stores over what another one loads",
    stores_twice: "two elements are stored to one address",
    loads_from_another_program: "a program loads what another one stores",
    differs_from_another_program: "two programs store different values to one address",
}


def main() -> None:
    for kernel, fault in FAULTS.items():
        name, memory = kernel.fn.__name__, torch.zeros(4 * HALF)  # of which the kernel is given the middle
        expected = nullcontext() if fault is None else pytest.raises(Exception, match=fault)
        with expected as raised, watched():
            kernel[(2,)](memory[HALF : 3 * HALF], HALF=HALF)
        assert raised is None or f"in kernel {name}" in raised.value.__notes__, name
        print("passed:", name)


if __name__ == "__main__":
    assert sys.argv[1] == "cpu"
    main()
