"""Check the arguments of `unroll`, `plan` and `GraphedMatchingLoss`, and convert them to tensors.

Errors name the argument and not the callable, since several callables share the checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from mtt_fast.augmentation.protocol import Augment
from mtt_fast.checks import check_ordinary
from mtt_fast.engine.optimizers import Adam
from mtt_fast.errors import InputError
from mtt_fast.kernels import LabelKind
from mtt_fast.networks.convnet import is_plain_convnet
from mtt_fast.networks.protocol import Network
from mtt_fast.runtime.prefetch import upload


def check_context() -> None:
    """Raise `InputError` where no gradient can be taken: in `torch.inference_mode`, `torch.func`, `torch.jit.trace` and `torch.compile`."""
    if torch.is_inference_mode_enabled():
        raise InputError(
            "found torch.inference_mode, in which no gradient of a student can be taken; use torch.no_grad"
        )
    if torch._C._are_functorch_transforms_active():
        raise InputError(
            "found a transform of torch.func, whose tensors the sweeps cannot read; call without it, and take the "
            "gradient by backward() or torch.autograd.grad"
        )
    if torch._C._get_tracing_state() is not None:  # torch.jit.is_tracing, which its types leave out
        raise InputError("found torch.jit.trace, which cannot trace the sweeps; call outside of what is traced")
    if torch.compiler.is_compiling():
        torch.compiler.disable(_refuse_compilation)()  # not traced: torch 2.11 fails on the `raise` itself


def _refuse_compilation() -> None:
    raise InputError("found torch.compile, which cannot trace the sweeps; call outside of what is compiled")


def saveable(tensor: Tensor) -> Tensor:
    """Return `tensor`, or a copy if it was made in `torch.inference_mode`, since autograd cannot save such a tensor."""
    return tensor.clone() if tensor.is_inference() else tensor


def check_types(**tensors: Any) -> None:
    """Raise `InputError` unless `tensors` are ordinary tensors (not nested, sparse, float8 or fake)."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            parts = isinstance(value, (tuple, list)) and any(isinstance(part, Tensor) for part in value)
            fix = "; join the parts into one tensor by torch.cat, and split it again in the module or the loss" * parts
            if name == "labels" and value is None:
                fix = "; a `loss` that needs no labels may ignore them: give torch.arange(len(images), device=images.device)"
            if name == "velocity" and parts:
                fix = "; torch.stack makes one (2, P) of Adam's two moments"
            if name in ("theta", "start", "target"):
                fix = "; torch.nn.utils.parameters_to_vector makes one of a list of parameters"
            raise InputError(f"`{name}`: expected a tensor, found {type(value).__name__}{fix}")
        if isinstance(value, FakeTensor):
            raise InputError(
                f"`{name}`: expected an ordinary tensor, found a FakeTensor; call outside of FakeTensorMode"
            )
        check_ordinary(f"`{name}`", value)


def check_augment(augment: Any) -> None:
    """Raise `InputError` unless `augment` is None or an augmentation."""
    is_class = isinstance(augment, type)
    if augment is not None and (is_class or not (callable(augment) and hasattr(augment, "draw"))):
        found = f"the class {augment.__name__}; call it to make one" if is_class else type(augment).__name__
        raise InputError(f"`augment`: expected an augmentation, such as SiameseAugment, found {found}")


def check_target(target: Tensor, start: Tensor) -> None:
    """Raise `InputError` unless `target` is a floating-point tensor of the shape and on the device of `start`."""
    check_types(target=target)
    if (target.shape, target.device) != (start.shape, start.device):
        raise InputError(
            f"`target`: expected the shape and the device of start, {tuple(start.shape)} on {start.device}, found "
            f"{tuple(target.shape)} on {target.device}"
        )
    if not target.is_floating_point():
        raise InputError(f"`target`: expected floating-point numbers, found {target.dtype}; use .float()")


def check_optimizer(optimizer: Any, momentum: float, weight_decay: float) -> None:
    """Raise `InputError` unless `optimizer` is None, or `Adam` without SGD's `momentum` and `weight_decay`."""
    if optimizer is None:
        return
    if not isinstance(optimizer, Adam):
        is_class = isinstance(optimizer, type)
        kind = optimizer if is_class else type(optimizer)
        raise InputError(
            f"`optimizer`: expected mtt_fast.Adam(…), or None for SGD, found {'the class ' * is_class}{kind.__module__}."
            f"{kind.__name__}; the learning rate is `lr`"
        )
    if momentum or weight_decay:
        raise InputError(
            f"`momentum` {momentum:g}, `weight_decay` {weight_decay:g}: expected 0 with an `optimizer`, since they are SGD's; use "
            "Adam(betas=…, weight_decay=…)"
        )


def check_velocity(velocity: Tensor | None, theta: Tensor, adam: Adam | None) -> None:
    """Raise `InputError` unless `velocity` is None, or has the shape, dtype and device that follow from `theta` and `adam`.

    With `adam` a velocity must be given if and only if `adam.steps` is not 0.
    """
    if adam is not None and (velocity is not None) != (adam.steps > 0):
        found = "none" if velocity is None else "one"
        raise InputError(
            f"`velocity`: expected {'one' if adam.steps else 'none'} with Adam(steps={adam.steps}), found {found}; `steps` counts "
            "the steps of the training before, whose moments `return_velocity` returned"
        )
    if velocity is None:
        return
    check_types(velocity=velocity)
    shape = theta.shape if adam is None else (adam.moments, *theta.shape)
    if velocity.shape != shape:
        raise InputError(
            f"`velocity`: expected shape {tuple(shape)}, found {tuple(velocity.shape)}; SGD has one velocity (P,), Adam as "
            "`optimizer` two moments (2, P)"
        )
    for attribute in ("dtype", "device"):
        actual, expected = getattr(velocity, attribute), getattr(theta, attribute)
        if actual != expected:
            raise InputError(f"`velocity`: expected {attribute} {expected} of theta, found {actual}")


def kind_of(labels: Tensor, kind: LabelKind | None) -> LabelKind:
    """Return `kind`, or by default the kind that follows from the dtype of `labels`. Raises `InputError` if they do not fit."""
    soft = labels.is_floating_point()
    if kind is None:
        return "probabilities" if soft else "indices"
    if (kind == "indices") == soft:
        raise InputError(f"`label_kind` '{kind}': does not fit labels of dtype {labels.dtype}")
    return kind


def checked_batches(batches: Tensor | Sequence[Tensor], images: Tensor) -> tuple[Tensor, ...]:
    """Return the indices (b,) int64 of each step, on the device of `images`. Raises `InputError` for anything else.

    They are copies, so the caller may overwrite `batches` before the backward pass.
    """
    if not images.dim() or not len(images):
        raise InputError(f"`images`: expected at least one, (n, …), found shape {tuple(images.shape)}")
    try:
        rows = tuple(row if isinstance(row, Tensor) else torch.as_tensor(row, device="cpu") for row in batches)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"`batches`: expected vectors of indices into the images, one a step, found {type(batches).__name__}: {error}"
        ) from error
    if not rows:
        raise InputError("`batches`: expected at least one step, found none")
    for n, row in enumerate(rows):
        check_types(batches=row)
        is_integer = not (row.is_floating_point() or row.is_complex() or row.dtype == torch.bool)
        if row.dim() != 1 or len(row) == 0 or not is_integer:
            raise InputError(
                f"`batches`: expected a vector of indices for step {n}, found {row.dtype} of shape {tuple(row.shape)}; a "
                "single step is [index], and mask.nonzero()[:, 0] the indices of a mask"
            )
    # indices on a GPU are checked by the look-up of the labels, without a synchronisation
    on_host = {n: row for n, row in enumerate(rows) if row.device.type == "cpu"}
    if on_host and not _are_in_range(torch.cat([row.long() for row in on_host.values()]), len(images)):
        n, row = next((n, row.long()) for n, row in on_host.items() if not _are_in_range(row.long(), len(images)))
        raise InputError(
            f"`batches`: expected indices 0 … {len(images) - 1}, found {int(row.min())} … {int(row.max())} in step {n}"
        )
    all_on_host = len(on_host) == len(rows)  # then one copy moves them to the device
    indices = torch.cat([row.long() if all_on_host else row.to(images.device, torch.long) for row in rows])
    indices = upload(indices, images.device) if all_on_host else for_checked_lookup(indices, len(images))
    split: tuple[Tensor, ...] = indices.split([len(row) for row in rows])
    return split


def for_checked_lookup(indices: Tensor, end: int) -> Tensor:
    """Return `indices` with each negative one replaced by `end`, so that a look-up raises and does not count from the end."""
    return indices.where(indices >= 0, end)


def _are_in_range(indices: Tensor, end: int) -> bool:
    return 0 <= int(indices.min()) <= int(indices.max()) < end


def check_student_tensors(
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    net: Network,
    *,
    has_loss: bool,
    theta_name: str,
) -> None:
    """Raise `InputError` unless shapes, dtypes and devices fit each other and the network.

    With a user's loss (`has_loss`) labels may have any shape (n, …). Errors call the parameters `theta_name`.
    """
    has_dtype = theta.dtype in (torch.float32, torch.float64)
    if theta.shape != (net.num_parameters,) or not has_dtype:
        remedy = "" if has_dtype else "; use .float(), of a module before it is wrapped"
        raise InputError(
            f"`{theta_name}`: expected ({net.num_parameters},) parameters of the network, float32 or float64, "
            f"found {theta.dtype} of shape {tuple(theta.shape)}{remedy}"
        )
    if not images.is_floating_point() or labels.shape[:1] != images.shape[:1]:
        remedy = f"; use .to({theta_name}.dtype), and .long() again in a module of tokens"
        remedy = "" if images.is_floating_point() else remedy
        raise InputError(
            f"`images`, `labels`: expected floating-point images and as many labels, found {images.dtype} of shape "
            f"{tuple(images.shape)} and labels of shape {tuple(labels.shape)}{remedy}"
        )
    if labels.is_complex() and labels.requires_grad:
        raise InputError(
            f"`labels`: expected real numbers where they require a gradient, found {labels.dtype}; use torch.view_as_real"
        )
    if not has_loss and (labels.is_complex() or labels.dim() != (2 if labels.is_floating_point() else 1)):
        raise InputError(
            f"`labels`: expected indices (n,) or soft labels (n, classes), found {labels.dtype} of shape "
            f"{tuple(labels.shape)}; use .long() for indices, .float() for one-hot rows, or give a `loss` that takes these"
        )
    devices = {tensor.device for tensor in (theta, images, labels)}  # `lr` is moved to the device of theta
    if len(devices) > 1:
        raise InputError(f"expected all tensors on one device, found {', '.join(sorted(map(str, devices)))}")


def check_image_shape(net: Network, image: torch.Size) -> None:
    """Raise `InputError` if `net` is a ConvNet that does not take augmented images of the shape `image`, (C, H, W)."""
    if is_plain_convnet(net) and (
        len(image) != 3 or image[0] != net.in_channels or net.feature_size_of(*image[1:]) != net.feature_size
    ):
        raise InputError(
            f"`images`: expected the network's {net.in_channels} channels and size {net.image_size}, found {tuple(image)}"
        )


def draws_of(
    draws: Sequence[Any] | None,
    augment: Augment | None,
    images: Tensor,
    batches: Sequence[Tensor],
    generator: torch.Generator | None,
) -> Sequence[Any]:
    """Return a copy of `draws`, or draw the random numbers of `augment` for each of the `batches` (None without `augment`).

    Tensors and arrays are copied, so the caller may overwrite them before the backward pass. Raises `InputError` for `draws` that
    are not a list with one entry per step, for `draws` without `augment`, and for draws that require a gradient.
    """
    if draws is None:
        copies = [_copy_of(augment.draw(images.detach()[index], generator)) if augment else None for index in batches]
    else:
        if isinstance(draws, Mapping) or not isinstance(draws, Iterable):
            raise InputError(f"`draws`: expected a list of the draws of each step, found {type(draws).__name__}")
        copies = [_copy_of(step_draws) for step_draws in draws]
        if augment is None or len(copies) != len(batches):
            raise InputError(
                f"`draws`: expected the draws of an augmentation for each of {len(batches)} steps, found {len(copies)}"
                + (" and no `augment`" if augment is None else "")
            )
    # under no_grad a copy requires no gradient
    if any(isinstance(each, Tensor) and each.requires_grad for each in tree_leaves(copies)):
        raise InputError(
            "`draws`: expected no tensor that requires a gradient, since none flows to it, found one; detach it"
        )
    return copies


def _copy_of(draws: Any) -> Any:
    return tree_map_only(
        (Tensor, np.ndarray), lambda each: each.clone() if isinstance(each, Tensor) else each.copy(), draws
    )


def checked_lr(lr: Any, theta: Tensor, steps: int) -> Tensor:
    """Return `lr` as a tensor (), (1,), (steps,) or (steps, P) on the device of `theta` (P,).

    Raises `InputError` for another shape, and for numbers that are negative or not finite. The values of a tensor are not
    checked: a learned rate may take any value, and the check would synchronise with a GPU.
    """
    lrs = _tensor_of(lr, theta)
    if lrs.shape not in ((), (1,), (steps,), (steps, len(theta))):
        raise InputError(
            f"`lr`: expected a scalar, a rate for each step ({steps},), or one for each step and parameter "
            f"({steps}, {len(theta)}), found shape {tuple(lrs.shape)}"
            + f"; `lr.expand({steps}, -1)` makes rates for each parameter those of each step"
            * (lrs.shape == theta.shape)
        )
    return lrs


def _tensor_of(lr: Any, theta: Tensor) -> Tensor:
    if isinstance(lr, Tensor):
        check_types(lr=lr)
        if lr.is_complex():
            raise InputError(f"`lr`: expected real numbers, found {lr.dtype}")
        if lr.is_meta and not theta.is_meta:
            raise InputError(
                f"`lr`: expected numbers, found a tensor on the device meta, which has none; use {theta.device}"
            )
        return lr.to(theta.device, None if lr.is_floating_point() else theta.dtype)
    if isinstance(lr, Sequence) and any(isinstance(rate, Tensor) for rate in lr):
        raise InputError("`lr`: expected numbers or one tensor, found a list of tensors; use torch.stack")
    try:
        lrs = torch.as_tensor(lr, dtype=theta.dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"`lr`: expected a number, numbers or a tensor, found {lr!r}") from error
    if not bool((lrs.isfinite() & (lrs >= 0)).all()):
        raise InputError(f"`lr`: expected finite numbers of at least 0, found {lr}")
    return upload(lrs, theta.device)
