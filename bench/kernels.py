"""Time each operation of mtt_fast.kernels at the shapes of a setting, beside the device's copy and matrix product."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.arguments import Block, block_arguments, blocks_of
from bench.measuring import copy_peak, interleaved, matrix_product_peak, repeated, seconds, set_precision
from bench.parsing import CommonOptions
from bench.records import publish
from bench.settings import BatchShape, Setting
from mtt_fast import kernels
from mtt_fast.augmentation.siamese import SiameseAugment
from mtt_fast.kernels import (
    Affine,
    BatchGradient,
    Folded,
    PackedParameters,
    PackedWeight,
    PartialPlanes,
    PartialSums,
    Patches,
    PlaneStats,
    Precision,
    Weight,
    WeightPlace,
    reference,
)
from mtt_fast.kernels.reference.block import gram_of
from mtt_fast.testing import added_up, relative_error

log = logging.getLogger("mtt_fast")

FLOAT64_TOLERANCE = 1e-9
FLOAT32_TOLERANCE = 1e-3  # a unit that rounding carries over ReLU's kink changes a gradient by more than rounding
BLOCK_TOLERANCE = 3e-2  # in a whole block the convolution's rounding carries more units over it
READ_IN_PARTS = {
    "add_planes": {0: 3, 1: 6},
    "norm_relu_pool": {0: 3},
    "norm_relu_pool_backward": {4: 3},
    "norm_relu_pool_dual": {0: 3, 1: 6},
    "norm_relu_pool_dual_backward": {5: 3, 6: 6},
    "conv_norm_relu_pool_backward": {3: 3},
    "conv_norm_relu_pool_dual_backward": {5: 3, 6: 6},
}
"""Operations that read planes in parts, as a convolution of few samples leaves them: the positions of these arguments, and their numbers of parts."""
FEW_SAMPLES = 16
_LEAST_SECONDS = 0.02  # an operation is repeated within a measurement until it takes so long


@dataclass(frozen=True)
class Options(CommonOptions, BatchShape):
    """Time each kernel at the shapes of a setting."""

    precision: str = "tf32"
    """precision of a GPU's float32 products: tf32, or fp32"""


@dataclass(frozen=True)
class Operation:
    """One operation at one shape: its arguments, and the least bytes and floating-point operations that it needs."""

    name: str
    shape: str
    arguments: tuple[Any, ...]
    moved: int
    """bytes: each input read once, each output written once"""
    flops: int
    tolerance: float = FLOAT32_TOLERANCE
    """allowed relative error in float32"""

    def function(self) -> Callable[..., Any]:
        """Return the function that is measured."""
        return getattr(kernels, self.name)  # type: ignore[no-any-return]

    def run(self) -> Any:
        """Call the operation once."""
        return self.function()(*self.arguments)


def main(options: Options, command: str) -> None:
    """Measure, print the table, write the record."""
    device, setting = options.torch_device(), options.resolve()
    set_precision(device, options.precision)
    precision: Any = options.precision if device.type == "cuda" else "fp32"
    cases = {f"{op.name} {op.shape}": op for op in operations(setting, device, precision)}
    if device.type == "cuda":
        kernels.compile_ahead(lambda: call_all(cases.values()))
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, int] = {}
    for name, operation in cases.items():
        rows[name] = {"operation": operation.name, "shape": operation.shape, "problem": None, "seconds": None}
        try:
            rows[name] |= errors(operation)
            calls[name] = 1 + int(_LEAST_SECONDS / seconds(operation.run, device))
        except Exception as error:  # the row records the failure, and the others continue
            rows[name]["problem"] = f"{type(error).__name__}: {error}"
            continue
        if not (rows[name]["error_float64"] <= FLOAT64_TOLERANCE and rows[name]["error"] <= operation.tolerance):
            rows[name]["problem"] = "wrong"
            del calls[name]
    copy, product = copy_peak(device), matrix_product_peak(device)

    def measure(name: str) -> float:
        return seconds(repeated(cases[name].run, calls[name], device), device) / calls[name]

    timings = interleaved(
        options.repetitions, calls, measure, lambda name, error: rows[name].update(problem=str(error))
    )
    for name, timing in timings.items():
        operation, median = cases[name], timing["median"]
        bandwidth, speed = operation.moved / median, operation.flops / median
        rows[name] |= {
            "seconds": timing, "bytes_per_second": bandwidth, "share_of_copy": bandwidth / copy,
            "flops_per_second": speed or None, "share_of_product": speed / product if speed else None,
        }  # fmt: skip
    conditions = {"case": str(setting), "copy_bytes_per_second": copy, "matrix_product_flops": product}
    publish(options, "kernels", f"kernels-{options.label()}-{device.type}", device, conditions, rows.values(), command)


def call_all(every: Iterable[Operation]) -> None:
    """Call each operation as `errors` does. What fails is passed over: it fails again when it is measured."""
    for operation in every:
        for arguments in (map(in_float64, operation.arguments), operation.arguments):
            with contextlib.suppress(Exception):
                operation.function()(*arguments)


def errors(operation: Operation, function: Callable[..., Any] | None = None) -> dict[str, float]:
    """Return the operation's largest relative errors, in float64 and in float32, against the reference in float64.

    `function` replaces the operation's own if given.
    """
    function = function or operation.function()
    wide = [in_float64(argument) for argument in operation.arguments]
    expected = exact_results(operation.name, wide)

    def error(arguments: list[Any]) -> float:
        results = results_of(operation.name, function(*arguments)) + added_to(arguments)
        pairs = zip(results, expected, strict=True)
        return max(relative_error(mine, theirs, floor=1e-6) for mine, theirs in pairs)

    return {"error_float64": error(wide), "error": error(list(operation.arguments))}


def operations(setting: Setting, device: torch.device, precision: Precision = "fp32") -> Iterator[Operation]:
    """Yield every operation at every shape that a step of the setting has, with a norm and without, in `precision`.

    For few samples also the operations that read planes in parts.
    """
    for operation in _operations_of_tensors(setting, device, precision):
        if operation.name != "add_planes":
            yield operation
        if operation.name == "add_planes" or (operation.name in READ_IN_PARTS and setting.batch <= FEW_SAMPLES):
            arguments = in_parts(operation.name, operation.arguments)
            parts = sum(each.parts.nbytes for each in arguments if isinstance(each, PartialPlanes))
            yield replace(
                operation, shape=f"{operation.shape} in parts", arguments=arguments, moved=operation.moved + parts
            )


def in_parts(operation: str, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Return the arguments with the planes that `operation` reads in parts, of other values, as a convolution leaves them."""
    changed = list(arguments)
    for place, count in READ_IN_PARTS[operation].items():
        batch, channels, height, width = changed[place].shape
        parts = torch.randn(count, batch, height, width, channels, device=changed[place].device)
        changed[place] = PartialPlanes(parts.permute(0, 1, 4, 2, 3), torch.empty_like(changed[place]))
    return tuple(changed)


def _operations_of_tensors(setting: Setting, device: torch.device, precision: Precision) -> Iterator[Operation]:
    net, batch = setting.net, setting.batch
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        planes = len(shape) == 4 and shape[2:] != (3, 3)
        return values.contiguous(memory_format=torch.channels_last) if planes else values

    images = random(batch, net.in_channels, setting.side, setting.side).contiguous()
    rotated = (images, SiameseAugment("rotate").draw_parameters([images], generator))
    for name in ("colour_warp_mask", "colour_warp_mask_transpose"):
        yield Operation(name, f"{batch}×{net.in_channels}×{setting.side}²", rotated, 2 * images.nbytes, 0)
    vector, moved = images.new_zeros(2, 1)
    of_batch = kernels.BatchGradient(images.clone(), torch.arange(batch, device=device), *rotated)
    yield Operation(
        "adjoint_step", f"{batch}×{net.in_channels}×{setting.side}² of images",
        (vector, vector, vector, images.new_full((), -1.0), moved, None, 0.0, of_batch), 3 * images.nbytes, 0,
    )  # fmt: skip
    blocks = blocks_of(setting)
    for block in blocks:
        yield from _block_operations(block, block_arguments(block, batch, precision, generator))

    size = blocks[-1].out_size // 2
    features, layout = net.width * size * size, torch.channels_last
    p, p_dot = (random(batch, net.width, size, size).contiguous(memory_format=layout) for _ in range(2))
    labels = torch.arange(batch, device=device) % net.num_classes
    a, c, a_dot, c_dot = (
        random(net.num_classes, features), random(net.num_classes), random(net.num_classes, features), random(net.num_classes),
    )  # fmt: skip
    one, shape = 2 * batch * a.numel(), f"{batch}×{features}→{net.num_classes}"
    plain = (p, a / 30, c, labels, "indices")
    yield Operation("linear_cross_entropy", shape, plain, 2 * (p.nbytes + a.nbytes), 3 * one)
    dual = (p, p_dot, a / 30, c, a_dot / 30, c_dot, labels, "indices", None, None)
    yield Operation("linear_cross_entropy_dual", shape, dual, 4 * p.nbytes + 3 * a.nbytes, 8 * one)
    learned = (*dual[:-4], random(batch, net.num_classes), "logits", None, None)
    yield Operation("linear_cross_entropy_dual", f"{shape} logits", learned, 4 * p.nbytes + 3 * a.nbytes, 8 * one)

    yield from _vector_operations([random(net.num_parameters) for _ in range(6)], precision)
    total, rows, index = random(batch, features), random(batch, features), torch.arange(batch, device=device)
    yield Operation("index_add", f"{batch}×{features}", (total, index, rows, -1.0), 3 * rows.nbytes, 0)


def _block_operations(block: Block, arguments: Mapping[str, tuple[Any, ...]]) -> Iterator[Operation]:
    """Yield the operations of a block with their `arguments`."""
    (x, weight, *_), (y, *_) = arguments["conv3x3"], arguments["norm_relu_pool"]
    batch, dots = len(x), int(block.number > 1)  # images have no tangent
    pixels, pooled = batch * block.out_size**2, batch * (block.out_size // 2) ** 2
    ins, outs, small = x.nbytes, y.nbytes, y.itemsize * block.width * pooled
    one, used = 2 * weight.numel() * pixels, 2 * weight.numel() * 4 * pooled  # a convolution; as far as it is pooled
    costs = {  # bytes, floating-point operations
        "conv3x3": (ins + outs, one),
        "conv3x3_weight_gradient": (ins + outs, one),
        "conv3x3_dual": ((1 + dots) * ins + 2 * outs, (2 + dots) * one),
        "conv3x3_tangent": ((1 + dots) * ins + outs, (1 + dots) * one),
        "conv3x3_dual_weight_gradient": ((1 + dots) * ins + 2 * outs, (1 + dots) * one),
        "conv3x3_input_gradient": (ins + outs, one),
        "conv3x3_dual_input_gradient": (2 * (ins + outs), 3 * one),
        "conv3x3_input_gradient_tangent": (ins + 2 * outs, 2 * one),
        "norm_relu_pool": (outs + small, 0),
        "norm_relu_pool_backward": (2 * outs + small, 0),
        "norm_relu_pool_dual": (2 * (outs + small), 0),
        "norm_relu_pool_dual_backward": (4 * outs + 2 * small, 0),
        "image_patches": (2 * ins, 2 * (9 * block.channels + 1) ** 2 * 4 * pooled),
        "conv_norm_relu_pool": (ins + small, used),
        "conv_norm_relu_pool_backward": (ins + small, 2 * used),
        "conv_norm_relu_pool_dual": (ins + 2 * small, 2 * used),
        "conv_norm_relu_pool_dual_backward": (2 * (ins + small), 5 * used),
        "add_planes": (2 * outs, 0),
        "bias_relu_pool": (outs + small, 0),
        "bias_relu_pool_backward": (2 * outs + small, 0),
        "bias_relu_pool_dual": (2 * (outs + small), 0),
        "bias_relu_pool_dual_backward": (3 * outs + 2 * small, 0),
    }
    for name, given in arguments.items():
        without_planes = name == "image_patches" or name.startswith("conv_norm")
        channels = f"{block.channels}→{block.width}" if without_planes or name.startswith("conv3x3") else block.width
        size = block.out_size // 2 if without_planes else block.out_size
        tolerance = BLOCK_TOLERANCE if name.startswith("conv_norm") else FLOAT32_TOLERANCE
        yield Operation(name, f"{batch}×{channels}×{size}²", given, *costs[name], tolerance)


def _vector_operations(vectors: list[Tensor], precision: Precision) -> Iterator[Operation]:
    """Yield the operations on flat vectors, with the fewest arguments and with all."""
    a, b, c, d, *out = vectors
    lr, shape, one = a.new_full((), 0.01), f"{len(a)}", a.nbytes
    yield Operation("sgd_step", shape, (a, b, lr, out[0], None, None, 0.0, 0.0), 3 * one, 0)
    momentum = (a, b, lr, out[0], c, out[1], 0.9, 5e-4)
    yield Operation("sgd_step", f"{shape} momentum, decay", momentum, 5 * one, 0)
    yield Operation("adjoint_step", shape, (a, b, c, lr, out[0], None, 0.0), 3 * one, 0)
    incoming = (a, b, c, lr, out[0], d, 5e-4)
    yield Operation("adjoint_step", f"{shape} incoming, decay", incoming, 5 * one, 0)
    sums = PartialSums((a.view(1, -1),))
    yield Operation("add_up", shape, (sums,), 2 * one, 0)
    filters = max(1, math.isqrt(len(a) // 9))
    places = [WeightPlace(0, filters, filters)]
    yield Operation("pack_parameters", shape, (a, b, places, precision, 1.0), 6 * one, 0)
    yield Operation("squared_distance", shape, (a, b), 2 * one, 0)


def exact_results(operation: str, arguments: Sequence[Any]) -> list[Tensor]:
    """Return the reference's results in float64. On a GPU it does not ask cuDNN, whose results are among those compared."""
    wide = list(map(in_float64, arguments))
    with torch.backends.cudnn.flags(enabled=False):
        return results_of(operation, getattr(reference, operation)(*wide)) + added_to(wide)


def added_to(arguments: Iterable[Any]) -> list[Tensor]:
    """Return the gradients among `arguments` to which an operation adds those of a batch."""
    return [argument.out for argument in arguments if isinstance(argument, BatchGradient)]


def in_float64(argument: Any) -> Any:
    """Return `argument` with each floating-point tensor in it, also those of a named tuple, in float64."""
    if isinstance(argument, Patches):
        images = argument.images.double()
        return Patches(images, gram_of(images), argument.padding)
    if isinstance(argument, Folded):
        return None  # to be made again
    if isinstance(argument, PartialPlanes):
        return argument.parts.double().sum(0).contiguous(memory_format=torch.channels_last)
    if isinstance(argument, PartialSums):
        return PartialSums(tuple(map(in_float64, argument.pieces)), tuple(map(in_float64, argument.divisors)))
    if isinstance(argument, (Affine, PlaneStats, BatchGradient)):
        return type(argument)(*map(in_float64, argument))
    is_number = isinstance(argument, Tensor) and argument.is_floating_point()
    # a copy, as some results overwrite arguments
    return argument.to(torch.float64, copy=True) if is_number else argument


def results_of(operation: str, result: Any) -> list[Tensor]:
    """Return the tensors of an operation's result, in their order; those that are summands added up."""
    return list(added_up(operation, tuple(tensors_of(result))))


def tensors_of(result: Any) -> list[Tensor]:
    """Return the tensors of an operation's result, in their order."""
    if isinstance(result, Folded):
        return []  # as the back end lays it out
    if isinstance(result, Patches):
        return [result.images, result.gram.sum(1)]  # the parts are the back end's
    if isinstance(result, PartialPlanes):
        return list(reference.add_planes(result))
    if isinstance(result, PackedParameters):
        every = [copy for weight in (*result.weights, *result.weights_dot) for copy in copies_of(weight)]
        return [*every, *tensors_of((result.direction, result.scale, result.patches))]
    if isinstance(result, tuple):
        return [tensor for each in result for tensor in tensors_of(each)]
    return [result] if isinstance(result, Tensor) else []


def copies_of(weight: Weight) -> list[Tensor]:
    """Return the copies of a weight in the weight's own order; of one that is not packed, itself for each."""
    if not isinstance(weight, PackedWeight):
        return [weight, weight]
    return [weight.straight.permute(0, 3, 1, 2), weight.rotated.permute(3, 0, 1, 2).flip(2, 3)]
