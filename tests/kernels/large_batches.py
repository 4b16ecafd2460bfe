"""Check that kernels find a sample beyond 2³¹ elements, interpreted: `python -m tests.kernels.large_batches cpu`.

The memory of such a batch is reserved, and takes room only where it is touched. Of a grid only the last sample's programs run.
"""

from __future__ import annotations

import importlib
import math
import mmap
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from mtt_fast.kernels import Affine, PartialPlanes, triton
from mtt_fast.testing import relative_error
from tests.kernels.comparison import as_tuple, with_sizes
from tests.kernels.plane_comparison import PARTS
from tests.kernels.sanitizer import watched
from tests.kernels.warp_comparison import warp_rows

SAMPLES = 2**28  # eight numbers a sample, such as the means of eight planes, are 2³¹
MAP_NORESERVE = 0x4000  # of Linux; `mmap` has it from Python 3.13 on
FORMATS = (torch.contiguous_format, torch.channels_last)


class Sample(NamedTuple):
    """A tensor (1, …), or a tuple with such tensors."""

    value: Any


def last_of_many(sample: Any) -> Any:
    """Return SAMPLES samples, of which the last is `sample`, and the others are zero. A number stays itself."""
    if isinstance(sample, tuple):
        return type(sample)(*map(last_of_many, sample))
    if not isinstance(sample, Tensor):
        return sample
    many = reserve((SAMPLES, *sample.shape[1:]), sample.dtype, format_of(sample))
    many[-1:] = sample
    return many


def format_of(x: Tensor) -> torch.memory_format:
    """Return the memory format of a tensor."""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def reserve(
    shape: int | tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
    **_: Any,
) -> Tensor:
    """Return a tensor of zeros. Pages that are not touched take no memory."""
    sizes = (shape,) if isinstance(shape, int) else shape
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    flat = torch.frombuffer(mmap.mmap(-1, math.prod(sizes) * dtype.itemsize, flags=flags), dtype=dtype)
    if memory_format == torch.contiguous_format:
        return flat.view(sizes)
    batch, channels, height, width = sizes
    return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)


@contextmanager
def last_sample_alone(samples: int = SAMPLES) -> Iterator[None]:
    """Launch only the programs of the last of `samples`, and reserve the memory of results."""
    from triton.runtime import interpreter

    number_program = interpreter.InterpreterBuilder.set_grid_idx

    def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        # those that pack a weight are few, and all needed
        own = programs if programs < samples else programs // samples

        def renumbered(builder: Any, number: int, *rest: int) -> None:
            number_program(builder, number, *rest)
            builder.grid_idx = (programs - own + number, *rest)

        with patch.object(interpreter.InterpreterBuilder, "set_grid_idx", renumbered):
            kernel[(own,)](*arguments, **constants)

    with ExitStack() as patches:
        # the interpreter would copy all of the memory onto itself
        patches.enter_context(patch.object(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None))
        patches.enter_context(patch.object(torch, "empty", reserve))
        like = patch.object(torch, "empty_like", lambda x: reserve(x.shape, x.dtype, format_of(x)))
        patches.enter_context(like)
        for each in pkgutil.iter_modules(triton.__path__):
            module = importlib.import_module(f"{triton.__name__}.{each.name}")
            if hasattr(module, "launch") and each.name != "launch":
                patches.enter_context(patch.object(module, "launch", launch))
        yield


def check(case: object, operation: Callable[..., Any], *arguments: Any) -> Any:
    """Check that an operation makes of the last of SAMPLES samples what it makes of only this one. Return the latter."""
    alone = operation(*(each.value if isinstance(each, Sample) else each for each in arguments))
    with last_sample_alone():
        many = operation(*(last_of_many(each.value) if isinstance(each, Sample) else each for each in arguments))
    for place, (actual, expected) in enumerate(zip(as_tuple(many), as_tuple(alone), strict=True)):
        error = relative_error(actual[-1], expected[-1])
        assert error <= 1e-6, f"{case}, result {place}: error {error}"
        assert expected[-1].any(), f"{case}, result {place}: zero is what memory holds that nothing is stored to"
    print("passed:", case)
    return alone


def norm_and_bias(kind: str) -> None:
    """Check what follows a convolution."""
    y, y_dot, p_bar, p_bar_dot = (
        Sample(torch.randn(1, 8, side, side).contiguous(memory_format=torch.channels_last)) for side in (4, 4, 2, 2)
    )
    affine, affine_dot = (Affine(torch.randn(8), torch.randn(8)) for _ in range(2))
    _, *stats = check(("norm", kind), triton.norm_relu_pool, y, affine, 1e-5)
    back = (y, *map(Sample, stats), affine, p_bar)
    check(("norm, backward", kind), triton.norm_relu_pool_backward, *back)
    *_, both = check(("norm, dual", kind), triton.norm_relu_pool_dual, y, y_dot, affine, affine_dot, 1e-5)
    dual = (y, y_dot, Sample(both), affine, affine_dot, p_bar, p_bar_dot)
    check(("norm, dual backward", kind), triton.norm_relu_pool_dual_backward, *dual)
    check(("bias", kind), triton.bias_relu_pool, y, affine.beta)
    check(("bias, backward", kind), triton.bias_relu_pool_backward, y, affine.beta, p_bar)
    check(("bias, dual", kind), triton.bias_relu_pool_dual, y, y_dot, affine.beta, affine_dot.beta)
    check(("bias, dual backward", kind), triton.bias_relu_pool_dual_backward, y, affine.beta, p_bar, p_bar_dot)


def convolutions(form: torch.memory_format) -> None:
    """Check a convolution and its gradients, and sums of its parts."""
    from mtt_fast.kernels.triton.conv import POINTERS

    x, x_dot, bar, bar_dot = (Sample(torch.randn(1, 2, 4, 4).contiguous(memory_format=form)) for _ in range(4))
    weights, options = (torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 3)), (1, "fp32")
    check(("convolution", str(form)), POINTERS.conv3x3_dual, x, x_dot, *weights, *options)
    check(("input gradient", str(form)), POINTERS.conv3x3_dual_input_gradient, bar, bar_dot, *weights, *options)
    gradient = partial(check, ("weight gradient", str(form)), POINTERS.conv3x3_dual_weight_gradient)
    with_sizes("implicit_gemm", partial(gradient, x, x_dot, bar, bar_dot, *options), PROGRAMS=2**40)  # a part a sample
    y, planes = (Sample(torch.randn(1, 32, 4, 4).contiguous(memory_format=form)) for _ in range(2))
    check(
        ("parts of planes", str(form)),
        lambda *given: triton.add_planes(PartialPlanes(given[0][None], given[1])),
        y,
        planes,
    )


def copied_planes() -> None:
    """Check copies of planes for tf32's weight gradient: fewer than 2³¹ pixels, but more numbers."""
    from mtt_fast.kernels.triton import tma_correlate

    samples, channels, side = 2**18, 352, 4
    x, y_bar = (reserve((samples, each, side, side), torch.float32, torch.channels_last) for each in (8, channels))
    y_bar[-1] = torch.randn(channels, side, side)
    tile = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 16}
    with last_sample_alone(samples):
        _, (_, lines), _ = tma_correlate._copy_factors(x, None, y_bar, y_bar, 1, tile)
    assert lines.base.numel() > 2**31
    last = lines.base[-1, -(side + 2) * side :].view(side + 2, side)  # of the last channel, with two rows of zeros
    assert torch.equal(last[:side], y_bar[-1, -1])
    print("passed: copied planes")


def image_blocks() -> None:
    """Check the first block, and warps of its images."""
    from mtt_fast.kernels.triton import block

    x, parameters = torch.randn(1, 1, 4, 4), warp_rows((4, 1, 4, 4))[1:2].float()
    for name in ("colour_warp_mask", "colour_warp_mask_transpose"):
        check(name, getattr(triton, name), Sample(x), Sample(parameters))
    check("patches of a row", lambda x: block.image_patches(x, 1, "fp32", torch.tensor([len(x) - 1]))[:2], Sample(x))
    warped = lambda *given: block.image_patches(given[0], 1, "fp32", None, given[1])[:2]  # noqa: E731
    check("patches", warped, Sample(x), Sample(parameters))
    patches = block.image_patches(x, 1, "fp32")
    weights, options = (torch.randn(16, 1, 3, 3), torch.randn(16, 1, 3, 3)), (1e-5, "fp32")
    affine = [Affine(torch.randn(16), torch.randn(16)) for _ in range(2)]
    along = (Sample(patches), *weights, *affine)
    p, _, folded = check("block, dual", block.conv_norm_relu_pool_dual, *along, *options)
    bars = [Sample(torch.randn(p.shape).contiguous(memory_format=torch.channels_last)) for _ in range(2)]
    given = (*along, *bars, Sample(folded), *options)
    check("block, dual backward", block.conv_norm_relu_pool_dual_backward, *given)


def main() -> None:
    """Check convolutions in both formats, planes that one tile holds and larger ones, and images."""
    from mtt_fast.kernels.triton import channels_last_planes

    for form in FORMATS:
        convolutions(form)
    norm_and_bias("in one tile")
    with patch.object(channels_last_planes, "configuration", return_value=PARTS[0][1]):
        norm_and_bias("in parts")
    with_sizes("block", image_blocks, PROGRAMS=1)
    copied_planes()


if __name__ == "__main__":
    assert sys.argv[1] == "cpu"
    torch.manual_seed(0)
    with watched():
        main()
