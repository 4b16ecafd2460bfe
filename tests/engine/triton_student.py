"""Hold the fused student by Triton's kernels to the generic one: `python -m tests.engine.triton_student DEVICE PART PARTS`.

A program of its own, as kernels/triton_comparison.py is. Every back end that the table may name is taken in turn. It
prints a line for each case that passed.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any, get_args
from unittest.mock import patch

import torch
from torch import Tensor

from mtt_fast import ConvNet
from mtt_fast.engine.fused import FusedConvNetStudent
from mtt_fast.engine.student import GenericStudent
from mtt_fast.kernels import Precision
from mtt_fast.kernels.triton import dispatch
from mtt_fast.testing import relative_error
from tests.kernels.triton_comparison import poison

NETS = [
    (ConvNet(3, 3, (9, 6), 5, 2), 2),  # odd sides, not square; a width that has no kernels for the first block at once
    (ConvNet(1, 2, 4, 17, 1), 2),  # padding 3 in the first layer, more channels than a tile's least
    (ConvNet(3, 3, (6, 9), 16, 2), 2),  # the first block at once
    (ConvNet(1, 2, 4, 48, 1), 2),
]
LARGE = [(ConvNet(3, 10, 32, 128, 3), 9), (ConvNet(3, 5, 64, 100, 4), 3)]
BACKENDS = ("triton", "cudnn")

# relative errors: two right answers in float32 differ by the units that rounding carries over ReLU's kink
TOLERANCES = {"float64": 1e-10, "fp32": 1e-4, "tf32": 3e-2, "fp16": 3e-2, "bf16": 0.2}


def results(student: Any, theta: Tensor, images: Tensor, labels: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Return every result of a student, also with saved activations."""
    gradient = student.gradient(theta, images, labels, save=True)
    found = {"loss": gradient.loss, "gradient": gradient.theta}
    for name, saved in (("", None), (" from saved activations", gradient.saved)):
        tangent = student.gradient_jvp(theta, images, labels, v, saved)
        found[f"v_dot_g{name}"] = tangent.v_dot_g
        found[f"hessian_v{name}"] = tangent.hessian_v
        found[f"images{name}"] = tangent.images
    return found


def compare(net: ConvNet, batch: int, dtype: torch.dtype, precision: Any, backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    height, width = net.image_size if isinstance(net.image_size, tuple) else (net.image_size, net.image_size)
    theta, v = draw(net.num_parameters) / 2, draw(net.num_parameters)
    images, labels = draw(batch, net.in_channels, height, width), torch.arange(batch) % net.num_classes
    expected = results(GenericStudent(net), theta, images, labels, v)
    with patch.object(dispatch, "backend_of", lambda *_: backend):
        student = FusedConvNetStudent(net, "indices", precision)
        at = (theta.to(device, dtype), images.to(device, dtype), labels.to(device), v.to(device, dtype))
        found = results(student, *at)
    tolerance = TOLERANCES["float64" if dtype == torch.float64 else precision]
    for name, value in found.items():
        assert value.dtype == dtype, name
        error = relative_error(value.cpu().double(), expected[name], floor=1e-4)
        assert error <= tolerance, f"{name} of {net}, {dtype}, {precision}, {backend}: error {error}"
    print("passed:", net, dtype, precision, backend)


def main(device: str, part: int, parts: int) -> None:
    poison()
    precisions, exact, single = get_args(Precision), torch.float64, torch.float32
    cases: list[tuple[ConvNet, int, torch.dtype, str, str]] = [
        *((*NETS[0], exact, "fp32", backend) for backend in BACKENDS),
        *((*net, exact, "fp32", "triton") for net in NETS[1:]),
    ]
    if device == "cpu":  # interpreted, one case of each takes seconds, and tf32 is not rounded
        for net, precision in itertools.product((NETS[0], NETS[2]), ("fp32", "fp16", "bf16")):
            cases.append((*net, single, precision, "triton"))
    else:
        cases.append((*NETS[1], exact, "fp32", "cudnn"))
        every = itertools.product(NETS + LARGE, BACKENDS, precisions)
        cases += [(net, batch, single, precision, backend) for (net, batch), backend, precision in every]
        if torch.cuda.get_device_capability()[0] >= 9:  # by boxes what fits them
            cases += [(*net, single, precision, "tma") for net in NETS + LARGE for precision in precisions[1:]]
    for case in cases[part::parts]:
        compare(*case, device)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
