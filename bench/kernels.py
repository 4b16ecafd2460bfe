"""Time each operation of mtt_fast.kernels at the shapes of a setting, beside the device's copy and matrix product."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.measuring import copy_peak, interleaved, matrix_product_peak, repeated, seconds, set_precision
from bench.parsing import CommonOptions
from bench.render import publish
from bench.settings import Setting, Shape
from mtt_fast import kernels
from mtt_fast.augmentation.siamese import SiameseAugment, augment_parameters
from mtt_fast.kernels import (
    Affine,
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
from mtt_fast.networks.convnet import NORM_EPS
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
class Options(CommonOptions, Shape):
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


def errors(operation: Operation, function: Callable[..., Any] | None = None) -> dict[str, float]:
    """Return the operation's largest relative errors, in float64 and in float32, against the reference in float64.

    `function` replaces the operation's own if given.
    """
    function = function or operation.function()
    wide = [in_float64(argument) for argument in operation.arguments]
    expected = exact_results(operation.name, wide)

    def error(arguments: list[Any]) -> float:
        pairs = zip(results_of(operation.name, function(*arguments)), expected, strict=True)
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

    size = setting.side
    images = random(batch, net.in_channels, size, size).contiguous()
    draws = SiameseAugment("rotate").draw(images, generator)
    rotated = (images, augment_parameters(draws, images.shape).float())
    for name in ("colour_warp_mask", "colour_warp_mask_transpose"):
        yield Operation(name, f"{batch}×{net.in_channels}×{size}²", rotated, 2 * images.nbytes, 0)
    yield Operation(
        "colour_warp_mask_transpose_add", f"{batch}×{net.in_channels}×{size}²",
        (images.clone(), torch.arange(batch, device=device), *rotated, torch.full((), -1.0, device=device)),
        3 * images.nbytes, 0,
    )  # fmt: skip
    for block in range(net.depth):
        channels, padding = (net.width, 1) if block else (net.in_channels, net.first_padding)
        x, x_dot = random(2 * batch, channels, size, size).chunk(2)  # in pairs, as a step has them
        weight, weight_dot = random(net.width, channels, 3, 3) / 10, random(net.width, channels, 3, 3) / 10
        size += 2 * padding - 2
        y_dot, y = random(2 * batch, net.width, size, size).chunk(2)
        y_bar_dot, y_bar = random(2 * batch, net.width, size, size).chunk(2)
        one = 2 * weight.numel() * batch * size * size  # one convolution
        ins, outs = x.nbytes, y.nbytes
        shape = f"{batch}×{channels}→{net.width}×{size}²"
        x_dot_or_none = x_dot if block else None  # images have no tangent
        dots = 1 if block else 0
        yield Operation("conv3x3", shape, (x, weight, padding, precision), ins + outs, one)
        yield Operation("conv3x3_weight_gradient", shape, (x, y_bar, padding, precision), ins + outs, one)
        yield Operation(
            "conv3x3_dual",
            shape,
            (x, x_dot_or_none, weight, weight_dot, padding, precision),
            (1 + dots) * ins + 2 * outs,
            (2 + dots) * one,
        )
        yield Operation(
            "conv3x3_tangent",
            shape,
            (x, x_dot_or_none, weight, weight_dot, padding, precision),
            (1 + dots) * ins + outs,
            (1 + dots) * one,
        )
        yield Operation(
            "conv3x3_dual_weight_gradient", shape, (x, x_dot_or_none, y_bar, y_bar_dot, padding, precision),
            (1 + dots) * ins + 2 * outs, (1 + dots) * one,
        )  # fmt: skip
        both = (y_bar, y_bar_dot, weight, weight_dot, padding, precision)
        if block:
            yield Operation("conv3x3_input_gradient", shape, (y_bar, weight, padding, precision), ins + outs, one)
            yield Operation("conv3x3_dual_input_gradient", shape, both, 2 * (ins + outs), 3 * one)
        yield Operation("conv3x3_input_gradient_tangent", shape, both, ins + 2 * outs, 2 * one)

        gamma, beta, gamma_dot, beta_dot = (random(net.width) for _ in range(4))
        affine, affine_dot = Affine(gamma, beta), Affine(gamma_dot, beta_dot)
        plane_shape = f"{batch}×{net.width}×{size}²"
        pooled, mean, rstd = kernels.norm_relu_pool(y, affine, NORM_EPS)
        p_bar, p_bar_dot = torch.randn_like(pooled), torch.randn_like(pooled)
        small = pooled.nbytes
        yield Operation("norm_relu_pool", plane_shape, (y, affine, NORM_EPS), outs + small, 0)
        yield Operation("norm_relu_pool_backward", plane_shape, (y, mean, rstd, affine, p_bar), 2 * outs + small, 0)
        norm = (affine, affine_dot)
        yield Operation("norm_relu_pool_dual", plane_shape, (y, y_dot, *norm, NORM_EPS), 2 * (outs + small), 0)
        stats = kernels.norm_relu_pool_dual(y, y_dot, *norm, NORM_EPS)[2]
        yield Operation(
            "norm_relu_pool_dual_backward", plane_shape, (y, y_dot, stats, *norm, p_bar, p_bar_dot),
            4 * outs + 2 * small, 0,
        )  # fmt: skip
        bars = (p_bar, p_bar_dot)
        if block == 0:
            yield from _block_operations(x, weight, weight_dot, *norm, padding, precision, p_bar, p_bar_dot)
        yield Operation("add_planes", plane_shape, (y, y_dot), 2 * outs, 0)
        yield Operation("bias_relu_pool", plane_shape, (y, beta), outs + small, 0)
        yield Operation("bias_relu_pool_backward", plane_shape, (y, beta, p_bar), 2 * outs + small, 0)
        yield Operation("bias_relu_pool_dual", plane_shape, (y, y_dot, beta, beta_dot), 2 * (outs + small), 0)
        yield Operation("bias_relu_pool_dual_backward", plane_shape, (y, beta, *bars), 3 * outs + 2 * small, 0)
        size //= 2

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


def _block_operations(
    x: Tensor,
    weight: Tensor,
    weight_dot: Tensor,
    affine: Affine,
    affine_dot: Affine,
    padding: int,
    precision: Precision,
    p_bar: Tensor,
    p_bar_dot: Tensor,
) -> Iterator[Operation]:
    """Yield the operations of the first block, each with all that it needs made beforehand."""
    batch, filters, *sides = p_bar.shape
    shape = f"{batch}×{x.shape[1]}→{filters}×{sides[0]}²"
    one = 2 * weight.numel() * batch * 4 * sides[0] * sides[1]  # one convolution, as far as it is pooled
    small, ins, options = p_bar.nbytes, x.nbytes, (NORM_EPS, precision)
    patches = kernels.image_patches(x, padding, precision)
    index = torch.arange(batch, device=x.device)
    parameters = augment_parameters(SiameseAugment("rotate").draw(x), x.shape).to(x)
    sums = 2 * patches.gram.shape[-1] ** 2 * batch * 4 * sides[0] * sides[1]
    augmented = (x.contiguous(), padding, precision, index, parameters)
    yield Operation("image_patches", shape, augmented, 2 * ins, sums)
    p, folded = kernels.conv_norm_relu_pool(patches, weight, affine, *options)
    arguments = (patches, weight, affine)
    yield Operation("conv_norm_relu_pool", shape, (*arguments, *options), ins + small, one, BLOCK_TOLERANCE)
    yield Operation(
        "conv_norm_relu_pool_backward", shape, (*arguments, p_bar.to(p.dtype), folded, *options),
        ins + small, 2 * one, BLOCK_TOLERANCE,
    )  # fmt: skip
    along = (patches, weight, weight_dot, affine, affine_dot)
    _, _, folded = kernels.conv_norm_relu_pool_dual(*along, *options)
    bars = (p_bar.to(p.dtype), p_bar_dot.to(p.dtype))
    yield Operation("conv_norm_relu_pool_dual", shape, (*along, *options), ins + 2 * small, 2 * one, BLOCK_TOLERANCE)
    yield Operation(
        "conv_norm_relu_pool_dual_backward", shape, (*along, *bars, folded, *options),
        2 * (ins + small), 5 * one, BLOCK_TOLERANCE,
    )  # fmt: skip


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
    with torch.backends.cudnn.flags(enabled=False):
        return results_of(operation, getattr(reference, operation)(*map(in_float64, arguments)))


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
    if isinstance(argument, (Affine, PlaneStats)):
        return type(argument)(*map(in_float64, argument))
    is_number = isinstance(argument, Tensor) and argument.is_floating_point()
    # a copy, as some results overwrite arguments
    return argument.to(torch.float64, copy=True) if is_number else argument


def results_of(operation: str, result: Any) -> list[Tensor]:
    """Return the tensors of an operation's result, in their order; those that are summands added up."""
    tensors = tensors_of(result)
    return list(added_up(operation, tuple(tensors)))


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
