"""Hold the fused student by Triton's kernels to the generic one: `python -m tests.engine.students.triton_student DEVICE PART PARTS`.

A program of its own where it is interpreted, as kernels/triton_comparison.py is. Every back end that the table may name is
taken in turn. It prints a line for each case that passed.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, get_args
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast import ConvNet
from mtt_fast.augmentation.siamese import SiameseAugment
from mtt_fast.augmentation.warp import augment_with
from mtt_fast.engine.iteration import iteration
from mtt_fast.engine.students.fused import FusedConvNetStudent
from mtt_fast.engine.students.generic import GenericStudent, cross_entropy
from mtt_fast.engine.students.microbatches import InMicrobatches
from mtt_fast.engine.students.protocol import Loss, Student
from mtt_fast.kernels import Precision
from mtt_fast.kernels import dispatch as kernels_dispatch
from mtt_fast.kernels.triton import dispatch, tma_descriptors
from mtt_fast.testing import relative_error
from tests.kernels.comparison import Case, poison, run

NETS = [
    (ConvNet(3, 3, (9, 6), 5, 2), 2),  # odd sides, not square; a width that has no kernels for the first block at once
    (ConvNet(1, 2, 4, 17, 1), 2),  # padding 3 in the first layer, more channels than a tile's least
    (ConvNet(3, 3, (6, 9), 16, 2), 2),  # the first block at once
    (ConvNet(1, 2, 4, 48, 1), 2),
]
CUT = (ConvNet(8, 3, (6, 9), 16, 2, "none"), 2)  # without a norm, and with images that boxes fit
LARGE = [(ConvNet(3, 10, 32, 128, 3), 9), (ConvNet(3, 5, 64, 100, 4), 3)]
BACKENDS = ("triton", "cudnn")

# relative errors: two right answers in float32 differ by the units that rounding carries over ReLU's kink
TOLERANCES = {"float64": 1e-10, "fp32": 1e-4, "tf32": 3e-2, "fp16": 3e-2, "bf16": 0.2}
# Of a million units some lie that near to it: of the first large net autograd in float32 errs by 1.1e-3, by 3.8e-3 if its
# inputs are moved by 1e-6, and the reference by 2.4e-2, 2.9e-2 and 9.5e-2 where it rounds factors to tf32, fp16 and bf16; of
# the second by 4.3e-2, 3.7e-2 and 0.11.
LARGE_TOLERANCES = {"fp32": 1e-2, "tf32": 8e-2, "fp16": 8e-2, "bf16": 0.2}


def results(student: Any, theta: Tensor, images: Tensor, labels: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Return every result of a student, also with saved activations."""
    gradient = student.gradient(theta, images, labels, save=True)
    values = {"loss": gradient.loss, "gradient": gradient.gradient}
    for name, saved in (("", None), (" from saved activations", gradient.saved)):
        tangent = student.gradient_jvp(theta, images, labels, v, saved)
        values[f"v_dot_g{name}"] = tangent.v_dot_g
        values[f"hessian_v{name}"] = tangent.hessian_v
        values[f"images{name}"] = tangent.images
    return values


@functools.cache
def case(net: ConvNet, batch: int, loss: Loss) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return the arguments of a step in float64, and the generic student's results."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    height, width = net.image_size if isinstance(net.image_size, tuple) else (net.image_size, net.image_size)
    theta, v = draw(net.num_parameters) / 2, draw(net.num_parameters)
    images, labels = draw(batch, net.in_channels, height, width), torch.arange(batch) % net.num_classes
    at = (theta, images, labels, v)
    return at, results(GenericStudent(net, loss), *at)


CUT_TILE = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "TAPS": 3, "num_warps": 1, "num_stages": 2}
"""A tile by boxes that cuts convolutions by taps."""


def contrastive(logits: Tensor, labels: Tensor) -> Tensor:
    """Return a loss of the caller's own, which compares each sample with the others."""
    features = F.normalize(logits)
    return F.mse_loss(features @ features.T, (labels[:, None] == labels).to(logits.dtype))


def compare(
    net: ConvNet,
    batch: int,
    dtype: torch.dtype,
    precision: Any,
    backend: str,
    device: str,
    loss: Loss | None = None,
) -> None:
    (theta, images, labels, v), expected = case(net, batch, loss or cross_entropy)
    with taken(backend):
        student = FusedConvNetStudent(net, "indices", precision, loss)
        at = (theta.to(device, dtype), images.to(device, dtype), labels.to(device), v.to(device, dtype))
        actual = results(student, *at)
    tolerances = LARGE_TOLERANCES if any(net == large for large, _ in LARGE) else TOLERANCES
    tolerance = tolerances["float64" if dtype == torch.float64 else precision]
    # v·g may cancel to far less than a sum of as many products of either sign has
    products = float(v.norm() * expected["gradient"].norm()) / net.num_parameters**0.5
    for name, value in actual.items():
        assert value.dtype == dtype, name
        floor = products if name.startswith("v_dot_g") else 1e-4
        error = relative_error(value.cpu().double(), expected[name], floor=floor)
        assert error <= tolerance, f"{name} of {net}, {dtype}, {precision}, {backend}: error {error}"
    print("passed:", net, dtype, precision, backend, "" if loss is None else "own loss")


@contextmanager
def taken(backend: str) -> Iterator[None]:
    """Take a back end wherever it fits: one that the table may name, or boxes that cut every convolution into parts."""

    def tile(operation: str, *_: str) -> dict[str, int]:
        return CUT_TILE | ({"PROGRAMS": 4} if operation.endswith("weight_gradient") else {})

    if backend != "cut":
        with patch.object(dispatch, "backend_of", lambda *_: backend):
            yield
        return
    with (
        patch.object(dispatch, "backend_of", lambda *_: "tma"),
        patch.object(tma_descriptors, "box_configuration", tile),
    ):
        yield


OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")


def compare_iterations(net: ConvNet, dtype: torch.dtype, precision: Any, microbatch: int | None, device: str) -> None:
    """Compare the gradients of an iteration with a step of each augmentation; an index comes twice, in a step and in others."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    height, width = net.image_size if isinstance(net.image_size, tuple) else (net.image_size, net.image_size)
    images, start = draw(4, net.in_channels, height, width), draw(net.num_parameters) / 2
    batches = [torch.tensor(rows) for rows in ([2, 0, 2], [1, 3, 0], [3, 3, 3])] * 2
    lengths = (3,) * len(batches)
    like = torch.empty(3, *images.shape[1:], dtype=torch.float64)
    parameters = [SiameseAugment(operation).draw_parameters([like], generator) for operation in OPERATIONS]
    given = (start, start + draw(net.num_parameters) / 10, images, torch.arange(4) % net.num_classes)
    inputs = (*given, torch.tensor(0.05, dtype=torch.float64), torch.cat(batches), torch.cat(parameters))
    with patch.object(kernels_dispatch, "_INTERPRETED", False):
        expected = iteration(GenericStudent(net), augment_with, lengths)(*inputs)
    student: Student = FusedConvNetStudent(net, "indices", precision)
    if microbatch is not None:
        student = InMicrobatches(student, microbatch)
    with patch.object(dispatch, "backend_of", lambda *_: "triton"):
        at = [each.to(device, dtype if each.is_floating_point() else each.dtype) for each in inputs]
        results = iteration(student, SiameseAugment(), lengths)(*at)
    for name, actual, wanted in zip(("loss", "images", "lr"), results, expected, strict=True):
        error = relative_error(actual.cpu().double(), wanted, floor=1e-4)
        # errors of a step grow over six of them
        assert error <= 4 * TOLERANCES["float64" if dtype == torch.float64 else precision], f"{name} of {net}: {error}"
    print("passed: an iteration of", net, dtype, precision, microbatch)


def adds_something(net: tuple[ConvNet, int], precision: str, backend: str) -> bool:
    """Return whether a GPU compares a net so: compiling takes nearly all the time."""
    if backend == "tma":  # boxes, and what does not fit them by pointers
        return precision != "fp32"
    if precision == "bf16" and net == LARGE[1]:  # the kernels of fp16, which asks for more
        return False
    return backend == "triton" or precision == "tf32" or net in LARGE


def cases_of(device: str) -> list[Case]:
    """Return the comparisons of steps, and of whole iterations."""
    precisions, double, single = get_args(Precision), torch.float64, torch.float32
    steps: list[tuple[ConvNet, int, torch.dtype, str, str]] = [
        *((*NETS[0], double, "fp32", backend) for backend in BACKENDS),
        *((*net, double, "fp32", "triton") for net in NETS[1:]),
    ]
    if device == "cpu":  # interpreted, one case of each takes seconds, and tf32 is not rounded
        for net, precision in itertools.product((NETS[0], NETS[2]), ("fp32", "fp16", "bf16")):
            steps.append((*net, single, precision, "triton"))
        steps += [(*NETS[2], single, precision, "cut") for precision in ("fp32", "fp16", "bf16")]
        steps.append((*CUT, single, "fp32", "cut"))
    else:
        steps.append((*NETS[1], double, "fp32", "cudnn"))
        backends = (*BACKENDS, "tma") if torch.cuda.get_device_capability()[0] >= 9 else BACKENDS
        steps += [
            (*net, single, precision, backend)
            for precision, net, backend in itertools.product(precisions, NETS + LARGE, backends)
            if adds_something(net, precision, backend)
        ]
    iterations = [(net, double, "fp32", cut) for net, cut in ((NETS[0][0], None), (NETS[2][0], 2), (NETS[3][0], None))]
    iterations.append((NETS[2][0], single, "fp16", None))
    cases: list[Case] = [partial(compare, *step, device) for step in steps]
    for net, dtype, precision in ((NETS[2], double, "fp32"), (NETS[2], single, "fp16"), (NETS[0], single, "bf16")):
        cases.append(partial(compare, *net, dtype, precision, "triton", device, contrastive))
    return cases + [partial(compare_iterations, *iteration, device) for iteration in iterations]


def compare_part(device: str, part: int, parts: int) -> None:
    """Run part number `part` of the `parts`."""
    run(cases_of(device), part, parts)


if __name__ == "__main__":
    poison()  # in a test, a fixture does so
    compare_part(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
