"""Check in the backward pass that only a first derivative is asked for, and that nothing has changed since the forward pass.

Autograd does not detect writes through `.data`, or into a row of the path that became a module's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import xxhash
from torch import Tensor

from mtt_fast.errors import InputError
from mtt_fast.runtime.tensor_bytes import parts_of


def check_differentiated_once() -> None:
    """Raise `InputError` in a backward pass with create_graph=True, since second derivatives would silently be zero."""
    if torch.is_grad_enabled():
        raise InputError(
            "a student's steps are differentiable once, found a backward pass with create_graph=True; leave create_graph out, or "
            "take the steps yourself by torch.autograd.grad(…, create_graph=True)"
        )


def refuse_forward_mode(ctx: Any, *grad_inputs: Any) -> Any:
    """Raise `InputError`, as the `jvp` of an autograd function that has only a backward pass."""
    raise InputError(
        "expected a backward pass, found forward-mode differentiation (dual numbers); take the gradient by backward() or "
        "torch.autograd.grad"
    )


def check_one_gradient(gradients: Iterable[Tensor | None]) -> None:
    """Raise `InputError` in a batched backward pass (vmap over gradients), which the backward sweep does not support."""
    kinds = (torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor)
    if any(is_batched(each) for each in gradients if each is not None for is_batched in kinds):
        raise InputError(
            "expected a backward pass of one vector, found several at once, as of vectorize=True, is_grads_batched=True or "
            "torch.func.vmap; take one after the other"
        )


def checksums_of(**tensors: Tensor) -> dict[str, int]:
    """Return the checksums of the `tensors` on a CPU, by name. Tensors on a GPU are left out, so that nothing synchronises."""
    return {name: _checksum(tensor) for name, tensor in tensors.items() if tensor.device.type == "cpu"}


def check_unchanged(before: dict[str, int], **tensors: Tensor) -> None:
    """Raise `InputError` unless the `tensors` have the checksums that they had `before`."""
    for name, checksum in before.items():
        if _checksum(tensors[name]) != checksum:
            raise InputError(
                f"`{name}`: expected the same values in the backward pass as in the call, found others, written through `.data` or into a "
                "module's parameters; write after the backward pass, or into a clone()"
            )


def _checksum(tensor: Tensor) -> int:
    digest = xxhash.xxh3_64()
    for part in parts_of(tensor):
        digest.update(part)
    return digest.intdigest()


def check_repeated(first: Tensor, again: Tensor, repeat: Callable[[int], Tensor]) -> None:
    """Raise `InputError` if the fingerprints `again` (N, k) of the backward sweep differ from `first`, those of the forward sweep.

    The two sweeps may use different kernels (for attention in half precision), whose rounding can differ by more than the
    tolerance. So for a step n that differs, `repeat(n)` computes the fingerprint (k,) as the forward sweep did, and `first` is
    compared with this.
    """
    for n in _differ(first, again).any(1).nonzero().flatten().tolist():
        now = repeat(n)
        if bool((differs := _differ(first[n], now)).any()):
            raise InputError(
                f"expected the same network, loss, augmentation and path in the backward pass as in the call, found "
                f"{float(now[differs][0]):.6g} in place of {float(first[n][differs][0]):.6g} in step {n}; do not change "
                "what they read before the backward pass: attributes, `.data` of images and of rows of the path, and loop variables in a "
                "lambda (bind these: `lambda logits, labels, t=t: …`)"
            )


def _differ(first: Tensor, again: Tensor) -> Tensor:
    """Return a boolean mask of where two tensors differ by more than rounding. Values that are not finite do not count as different."""
    rounding = 1e-2 if first.is_cuda else 1e-3  # a GPU may use different kernels, with factors in half precision
    return ~torch.isclose(again, first, rtol=rounding, atol=1e-3) & first.isfinite() & again.isfinite()
