"""Check colour, warp and mask: the reference against torch's sampler, its transpose, and the other back ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast import kernels
from mtt_fast.kernels import WARP_PARAMETERS, BatchGradient, reference
from mtt_fast.kernels.native import extension
from mtt_fast.kernels.native import warp as native_warp
from mtt_fast.testing import assert_close
from tests.kernels.compiling import check, each_architecture, meta, recording
from tests.kernels.helpers import assert_same_by_any_threads, draw_warp_parameters
from tests.kernels.triton_comparison import compare

SHAPES = [
    (4, 3, 7, 5),
    (3, 1, 6, 9),
    (2, 4, 32, 33),  # a full vector of channels
    (2, 6, 5, 4),  # a part of a second one
    (2, 3, 1, 8),  # a line of pixels
    (2, 2, 6, 1),
]
OPERATIONS = ("colour_warp_mask", "colour_warp_mask_transpose")
FACTOR = torch.tensor(-0.37, dtype=torch.float64)


def added(out: Tensor, index: Tensor, y_bar: Tensor, parameters: Tensor | None, scale: Tensor) -> Tensor:
    """Return `out` with the gradient of a batch added by a step of the adjoint, whose vectors are of no account."""
    vector, moved = y_bar.new_zeros(2, 1)
    kernels.adjoint_step(vector, vector, vector, scale, moved, batch=BatchGradient(out, index, y_bar, parameters))
    return out


each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def row(**values: float) -> Tensor:
    """Return the parameters of one image; those that are not named are the identity's."""
    return torch.tensor([[values.get(name, 0.0) for name in WARP_PARAMETERS]], dtype=torch.float64)


def plain(images: Tensor, parameters: Tensor) -> Tensor:
    """Compute the same function by broadcasting and `grid_sample`."""
    (_, channels, height, width), n = images.shape, parameters[:, :, None, None, None]
    x = images + n[:, 0]
    x = torch.lerp(x.mean(1, keepdim=True).expand_as(x), x, 1 + n[:, 1])
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True).expand_as(x), x, 1 + n[:, 2])
    i = torch.arange(height, dtype=x.dtype)[:, None].expand(height, width)
    j = torch.arange(width, dtype=x.dtype).expand(height, width)
    below, beside, n = i - (height - 1) / 2, j - (width - 1) / 2, n[..., 0]
    source_i = i + n[:, 3] * below + n[:, 4] * beside + n[:, 5]
    source_j = j + n[:, 6] * below + n[:, 7] * beside + n[:, 8]
    grid = torch.stack([(2 * source_j + 1) / width - 1, (2 * source_i + 1) / height - 1], dim=-1)
    y = F.grid_sample(x, grid, align_corners=False)
    masked = (i >= n[:, 9]) & (i < n[:, 10]) & (j >= n[:, 11]) & (j < n[:, 12])
    return y.masked_fill(masked[:, None].expand(-1, channels, -1, -1), 0)


@pytest.mark.usefixtures("either_backend")
@each_shape
def test_values_and_transpose_are_those_of_torchs_sampler(shape: tuple[int, int, int, int]) -> None:
    images, parameters = torch.randn(shape, dtype=torch.float64, requires_grad=True), draw_warp_parameters(shape)
    expected = plain(images, parameters)
    y_bar = torch.randn(shape, dtype=torch.float64)
    (expected_bar,) = torch.autograd.grad(expected, images, y_bar)
    assert_close("y", kernels.colour_warp_mask(images.detach(), parameters), expected, 1e-12)
    assert_close("x_bar", kernels.colour_warp_mask_transpose(y_bar, parameters), expected_bar, 1e-12)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("change", ["brightness", "saturation", "contrast"])
def test_one_change_of_colour_has_its_transpose(change: str) -> None:
    images, y_bar = torch.randn(2, 1, 3, 6, 5, dtype=torch.float64)
    images.requires_grad_()
    parameters = row(**{change: 0.3})
    expected = plain(images, parameters)
    (expected_bar,) = torch.autograd.grad(expected, images, y_bar)
    assert_close("y", kernels.colour_warp_mask(images.detach(), parameters), expected, 1e-12)
    assert_close("x_bar", kernels.colour_warp_mask_transpose(y_bar, parameters), expected_bar, 1e-12)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("augmented", [True, False])
@each_shape
def test_the_transpose_is_added_to_the_rows_that_were_gathered(
    shape: tuple[int, int, int, int], augmented: bool
) -> None:
    """Gather with an index that comes again, and leave a row out."""
    rows, index = torch.randn(5, *shape[1:], dtype=torch.float64, requires_grad=True), torch.tensor([3, 0, 3, 4])
    index = index[: shape[0]]
    parameters = draw_warp_parameters(shape) if augmented else None
    batch = rows[index] if parameters is None else plain(rows[index], parameters)
    y_bar, out = torch.randn(shape, dtype=torch.float64), torch.randn(rows.shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(batch, rows, y_bar)
    expected = out + FACTOR * gradient
    assert_close("out", added(out, index, y_bar, parameters, FACTOR), expected, 1e-12)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adding_is_to_the_bit_what_its_parts_do(dtype: torch.dtype) -> None:
    shape = (4, 3, 7, 5)
    out, y_bar, parameters = (
        torch.randn(6, 3, 7, 5, dtype=dtype),
        torch.randn(shape, dtype=dtype),
        draw_warp_parameters(shape),
    )
    index, factor, parameters = torch.tensor([5, 1, 1, 5]), FACTOR.to(dtype), parameters.to(dtype)
    rows = kernels.colour_warp_mask_transpose(-factor * y_bar, parameters)
    expected = kernels.index_add(out.clone(), index, rows, alpha=-1)
    assert torch.equal(added(out, index, y_bar, parameters, factor), expected)


@pytest.mark.native
@each_shape
def test_the_native_kernel_in_float32(shape: tuple[int, int, int, int]) -> None:
    images, parameters = torch.randn(shape), draw_warp_parameters(shape).float()
    for name in OPERATIONS:
        actual = getattr(kernels, name)(images, parameters)
        assert actual.dtype == torch.float32
        assert_close(name, actual, getattr(reference, name)(images.double(), parameters.double()), 1e-6)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_zeros_and_whole_displacements_change_no_bit(dtype: torch.dtype) -> None:
    images = torch.randn(1, 3, 9, 8).to(dtype)
    shifted = F.pad(images, (1, 0, 0, 2))[:, :, 2:, :-1]
    for parameters, expected, back in (
        (row(), images, images),
        (row(column_by_column=-2), images.flip(3), images.flip(3)),
        (row(row_shift=2, column_shift=-1), shifted, F.pad(images, (0, 1, 2, 0))[:, :, :-2, 1:]),
    ):
        given = parameters.to(torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(kernels.colour_warp_mask(images, given), expected)
        assert torch.equal(kernels.colour_warp_mask_transpose(images, given), back)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("far", [1e2, 1e9, 1e30])
def test_nothing_comes_from_far_outside(far: float) -> None:
    images = torch.ones(1, 2, 5, 6)
    for shift in (far, -far):
        for parameters in (row(row_shift=shift).float(), row(column_shift=shift).float()):
            for name in OPERATIONS:
                assert torch.count_nonzero(getattr(kernels, name)(images, parameters)) == 0


@pytest.mark.usefixtures("either_backend")
def test_a_mask_over_everything_and_one_over_nothing() -> None:
    images = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    for name in OPERATIONS:
        everything = row(top=-1, bottom=9, left=0, right=6)
        assert torch.count_nonzero(getattr(kernels, name)(images, everything)) == 0
        for nothing in (row(top=2, bottom=2, left=0, right=6), row(top=0, bottom=5, left=4, right=3)):
            assert torch.equal(getattr(kernels, name)(images, nothing), images)


@pytest.mark.native
def test_the_native_kernel_does_not_depend_on_threads() -> None:
    shape = (30, 3, 40, 41)
    images, parameters = torch.randn(shape), draw_warp_parameters(shape).float()
    assert_same_by_any_threads(lambda: [getattr(kernels, name)(images, parameters) for name in OPERATIONS])


@pytest.mark.native
def test_large_results_are_written_whole_into_memory_that_was_used_before(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = extension.allocate
    monkeypatch.setattr(native_warp, "allocate", lambda like, shape: memory(like, shape).fill_(float("nan")))
    shape = (90, 3, 33, 32)
    images, parameters = torch.randn(shape), draw_warp_parameters(shape).float()
    for name in OPERATIONS * 2:
        actual = getattr(kernels, name)(images, parameters)
        assert actual.nbytes > extension.LARGE
        assert_close(name, actual, getattr(reference, name)(images.double(), parameters.double()), 1e-6)


def test_no_images() -> None:
    for name in OPERATIONS:
        assert getattr(kernels, name)(torch.empty(0, 3, 4, 4), torch.empty(0, 13)).shape == (0, 3, 4, 4)


IMAGES, ZEROS = torch.zeros(2, 3, 6, 6), torch.zeros(2, 13)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize(
    ("images", "parameters", "reason"),
    [
        (IMAGES[0], ZEROS, r"expected NAME \(B, C, H, W\), found \(3, 6, 6\)"),
        (IMAGES[:, :, :0], ZEROS, r"found \(2, 3, 0, 6\)"),
        (IMAGES.transpose(2, 3), ZEROS, "strides"),
        (IMAGES.long(), ZEROS, "int64"),
        (IMAGES, ZEROS[:, :12], "parameters of shape"),
        (IMAGES, ZEROS[:1], "parameters of shape"),
        (IMAGES, ZEROS.double(), "parameters of floating dtype torch.float32, found torch.float64"),
        (IMAGES.double(), ZEROS, "parameters of floating dtype torch.float64, found torch.float32"),
        (IMAGES.bfloat16(), ZEROS.bfloat16(), "parameters of floating dtype torch.float32"),
        (IMAGES, ZEROS.to("meta"), "one device"),
        (IMAGES.clone().requires_grad_(), ZEROS, "requires grad"),
        (IMAGES, ZEROS.clone().requires_grad_(), "parameters that requires grad"),
        (IMAGES, torch.cat([ZEROS[:1], row(row_by_row=-1).float()]), "have an inverse"),
        (IMAGES, torch.cat([ZEROS[:1], row(column_by_column=float("nan")).float()]), "have an inverse"),
        (IMAGES, torch.cat([ZEROS[:1], row(row_by_column=2, column_by_row=0.5).float()]), "have an inverse"),
    ],
)
def test_refuses(op: str, images: Tensor, parameters: Tensor, reason: str) -> None:
    name = "images" if op == "colour_warp_mask" else "y_bar"
    with pytest.raises(ValueError, match=f"^{op}: .*{reason.replace('NAME', name)}"):
        getattr(kernels, op)(images, parameters)


ROWS, INDEX, FLOAT = torch.zeros(5, 3, 6, 6), torch.tensor([0, 4]), FACTOR.float()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((ROWS, INDEX, IMAGES[0], ZEROS, FLOAT), r"y_bar \(B, C, H, W\), found \(3, 6, 6\)"),
        ((ROWS[:, :2], INDEX, IMAGES, ZEROS, FLOAT), r"out of shape \(5, 3, 6, 6\)"),
        ((ROWS.double(), INDEX, IMAGES, ZEROS, FLOAT), "out of floating dtype torch.float32"),
        ((ROWS.transpose(2, 3), INDEX, IMAGES, ZEROS, FLOAT), "out contiguous"),
        ((ROWS, INDEX, IMAGES, ZEROS, FACTOR), "scale of floating dtype torch.float32"),
        ((ROWS, INDEX, IMAGES, ZEROS, FLOAT[None]), "scale of shape"),
        ((ROWS, INDEX[:1], IMAGES, ZEROS, FLOAT), r"int64 indices \(2,\)"),
        ((ROWS, INDEX + 1, IMAGES, ZEROS, FLOAT), "indices 0 … 4, found 1 … 5"),
        ((ROWS, INDEX, IMAGES, ZEROS[:1], FLOAT), "parameters of shape"),
        ((ROWS, INDEX, IMAGES, row(row_by_row=-1).float().expand(2, -1).contiguous(), FLOAT), "have an inverse"),
        ((ROWS.clone().requires_grad_(), INDEX, IMAGES, ZEROS, FLOAT), "out that requires grad"),
    ],
)
def test_adding_refuses(arguments: tuple[Tensor, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^adjoint_step: .*{reason}"):
        added(*arguments)


@pytest.mark.slow
def test_triton_equals_the_reference_interpreted() -> None:
    lines = compare("warp", "cpu")
    assert len([line for line in lines if "colour_warp_mask" in line]) == 5 * (3 * 2 + 2 * 2)


@pytest.mark.gpu
def test_triton_equals_the_reference_on_a_gpu() -> None:
    compare("warp", "cuda")


@pytest.mark.slow
@each_architecture
def test_triton_compiles(architecture: str, tmp_path: Path) -> None:
    """Compile for one channel and three, at the sides of the smallest and of large images, in float32 and bfloat16."""
    from mtt_fast.kernels.triton import flat, warp

    with recording([flat, warp], architecture) as launches:
        for channels, side, dtype in ((1, 28, torch.float32), (3, 32, torch.float32), (3, 128, torch.bfloat16)):
            images, parameters = meta(4, channels, side, side).to(dtype), meta(4, 13)
            warp.colour_warp_mask(images, parameters)
            warp.colour_warp_mask_transpose(images, parameters)
            # images that are learned are float32, whatever the planes are
            index, images = torch.zeros(4, dtype=torch.long, device="meta"), images.float()
            for given in (parameters, None):
                if given is not None and (architecture, side) == ("sm_100", 128):
                    continue  # spills four registers
                of_batch = BatchGradient(meta(9, channels, side, side), index, images, given)
                flat.adjoint_step(meta(8), meta(8), meta(8), meta(), meta(8), None, 0.0, of_batch)
    assert len(launches) == 3 * 4 - (architecture == "sm_100")
    check(launches, architecture, tmp_path)
