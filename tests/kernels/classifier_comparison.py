"""Hold Triton's classifier to the reference: a part of the program of triton_comparison.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, get_args
from unittest.mock import patch

import torch
from torch import Tensor

from mtt_fast.kernels import LabelKind, reference, triton
from mtt_fast.kernels.reference.flat import power_of_two
from mtt_fast.kernels.types import LARGEST_COTANGENT, accumulator, memory_format

CLASSIFIERS = [  # (B, C, h, w, K)
    (5, 7, 1, 1, 4),
    (1, 3, 1, 1, 1),  # one sample, one class
    (33, 5, 3, 1, 10),  # several tiles of samples
    (5, 70, 2, 2, 2),  # several tiles of features
    (3, 2, 2, 3, 37),  # a part of a tile in every direction
    (1, 3, 7, 3, 100),
    (2, 4, 1, 2, 128),
    (5, 2, 1, 1, 129),  # several blocks of classes, the last one short
    (33, 7, 3, 2, 200),  # the same in each sum that is a logit
    (2, 3, 1, 1, 1000),
]
LARGE_CLASSIFIERS = [(100, 128, 4, 4, classes) for classes in (10, 100, 200, 1000)]


def classifier_cases(device: str) -> list[Callable[[], None]]:
    """Return the comparisons of all dtypes and shapes, each dtype in both formats; every second shape has logits that overflow.

    On a GPU, where nearly all the time goes into compiling, two shapes are compared in two dtypes, the next two in the others,
    and small shapes of one block of classes with one kind of labels.
    """
    dtypes, formats = (
        (torch.float64, torch.float32, torch.float16, torch.bfloat16),
        (torch.channels_last, torch.contiguous_format),
    )
    all_kinds = get_args(LabelKind)

    def kinds(shape: tuple[int, ...], number: int, place: int) -> tuple[LabelKind, ...]:
        has_all = device == "cpu" or shape in LARGE_CLASSIFIERS or shape[-1] > 128
        return all_kinds if has_all else (all_kinds[(number + place // 2) % 3],)

    shapes = enumerate(CLASSIFIERS if device == "cpu" else CLASSIFIERS + LARGE_CLASSIFIERS)
    cases: list[Callable[[], None]] = [
        partial(
            classifier,
            device,
            shape,
            dtype,
            formats[(number + place) % 2],
            kinds(shape, number, place),
            1e4 * (number % 2),
        )
        for (number, shape), (place, dtype) in itertools.product(shapes, enumerate(dtypes))
        if device == "cpu" or place % 2 == number // 2 % 2
    ]
    if device == "cpu":
        cases.append(few_at_a_time)
    # one block of classes, and several
    return cases + [partial(strange_numbers, device, shape) for shape in (CLASSIFIERS[0], CLASSIFIERS[8])]


def classifier(
    device: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    form: torch.memory_format,
    kinds: tuple[LabelKind, ...],
    outlier: float,
) -> None:
    """Compare both operations, with labels of each of these kinds."""
    for kind in kinds:
        primal, dual = classifier_arguments(device, shape, dtype, form, kind, outlier)
        case = (shape, str(dtype), kind)
        compare_classifier("linear_cross_entropy", primal, case)
        compare_classifier("linear_cross_entropy_dual", dual, case)
        if dtype == torch.float16:
            given = (torch.tensor(4.0, device=device), torch.tensor(0.5, device=device))
            compare_classifier("linear_cross_entropy_dual", (*dual[:-2], *given), case)


def classifier_arguments(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, form: torch.memory_format, kind: str, outlier: float = 0
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the arguments of both operations."""
    *planes, classes = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(size, dtype=accumulator(dtype)).to(device)

    p, p_dot = (draw(*planes).to(dtype).contiguous(memory_format=form) for _ in range(2))
    weight, weight_dot = (draw(classes, p[0].numel()) for _ in range(2))
    bias, bias_dot = (draw(classes) for _ in range(2))
    bias[-1] += outlier
    soft = draw(planes[0], classes)
    labels = {"indices": soft.argmax(1), "probabilities": 1.5 * soft.relu(), "logits": 3 * soft}[kind]
    dual = (p, p_dot, weight, bias, weight_dot, bias_dot, labels, kind, None, None)
    return (p, weight, bias, labels, kind), dual


def compare_classifier(name: str, arguments: tuple[Any, ...], case: tuple[object, ...]) -> None:
    """Hold Triton's results to the reference's in float64, and the scale of float16 to `power_of_two`."""
    p, given = arguments[0], arguments
    scales: tuple[Tensor | None, ...] = (None, None)
    if name.endswith("dual"):
        given, scales = arguments[:-2], arguments[-2:]
    scale, direction_scale = scales
    *results, factor = getattr(triton, name)(*arguments)
    # interpreted, a second run could not differ
    repeated = getattr(triton, name)(*arguments)[:-1] if p.is_cuda else results
    unscaled = (None, None) if name.endswith("dual") else ()
    wide = [each.double() if isinstance(each, Tensor) and each.is_floating_point() else each for each in given]
    *expected, _ = getattr(reference, name)(*wide, *unscaled)
    bars = [each.contiguous() for each in expected if each is not None and each.dim() == 4]
    expected_factor = power_of_two(LARGEST_COTANGENT, *bars) if p.dtype == torch.float16 else None
    assert factor is scale if scale is not None else (factor is None) == (expected_factor is None), case
    if factor is not None and expected_factor is not None and scale is None:
        assert factor.dtype == torch.float32, case
        assert float(factor) == float(expected_factor), (case, factor, expected_factor)

    labels_bar_dot = 5
    # logits grow with the root of the number of features, and errors of their exponentials with the logits
    single = max(5e-5, 2e-6 * p[0].numel() ** 0.5)
    tolerances = {torch.float64: 1e-12, torch.float32: single, torch.float16: 2e-3, torch.bfloat16: 1e-2}
    for place, (actual, again, wanted) in enumerate(zip(results, repeated, expected, strict=True)):
        where = (name, *case, f"result {place}")
        assert (actual is None) == (wanted is None), where
        if wanted is None:
            continue
        dtype = p.dtype if actual.dim() == 4 else accumulator(p.dtype)
        assert (actual.shape, actual.dtype) == (wanted.shape, dtype), where
        assert actual.dim() < 4 or actual.is_contiguous(memory_format=memory_format(p)), where
        assert torch.equal(actual, again), f"{where} differs from one run to the next"
        size = 1.0
        if factor is not None and place not in (0, labels_bar_dot):
            size = float(factor)
        elif direction_scale is not None:
            size = 1 / float(direction_scale)
        # a loss's derivative is a sum of numbers of either sign, each as large as a logit's derivative
        floor = 0.1 * size * (p[0].numel() ** 0.5 if name.endswith("dual") and place == 0 else 1)
        error = float((actual.double() - size * wanted).norm() / (size * wanted.norm()).clamp_min(floor))
        assert error <= tolerances[actual.dtype], (*where, error)
    print("passed:", (name, case))


def few_at_a_time() -> None:
    """Compare where the search for float16's largest gradient takes turns, as among many features or samples."""
    from mtt_fast.kernels.triton import classifier_kernels
    from mtt_fast.kernels.triton.launch import tl

    sizes = {"FEATURES": tl.constexpr(1), "MAGNITUDES": tl.constexpr(2)}
    with patch.multiple(classifier_kernels, **sizes):
        classifier("cpu", CLASSIFIERS[0], torch.float16, torch.channels_last, get_args(LabelKind), 0)


def strange_numbers(device: str, shape: tuple[int, ...]) -> None:
    """Check labels that are no class, labels that are −∞, and what is not finite or zero in float16."""
    (p, weight, bias, *_), _ = classifier_arguments(device, shape, torch.float32, torch.channels_last, "indices")
    for unknown in (-1, shape[-1]):
        labels = torch.full((len(p),), unknown, device=device)
        assert triton.linear_cross_entropy(p, weight, bias, labels, "indices")[0].isnan(), "a label that is no class"
    primal, dual = classifier_arguments(device, shape, torch.float32, torch.channels_last, "logits")
    bias, labels = primal[2:4]  # of both operations
    labels[:, : shape[-1] // 2] = float("-inf")  # where there are several blocks, all classes of one
    bias -= 200  # exponentials of logits and of labels vanish
    labels -= 200
    compare_classifier("linear_cross_entropy", primal, (shape, "labels of −∞"))
    compare_classifier("linear_cross_entropy_dual", dual, (shape, "labels of −∞"))
    (p, weight, bias, *rest), _ = classifier_arguments(device, shape, torch.float16, torch.channels_last, "indices")
    zero = triton.linear_cross_entropy(p, 0 * weight, bias, *rest)
    infinite = triton.linear_cross_entropy(p, weight, bias / 0, *rest)
    assert float(zero[-1]) == float(infinite[-1]) == 1, shape
    assert not infinite[1].isfinite().any(), shape
