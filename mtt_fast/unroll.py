"""N student steps, and the exact meta-gradient through all of them in the memory of one.

Forward, keep only the parameters θ_0 … θ_N. Backward, walk the steps in reverse with the adjoint λ of the parameters:
everything that one step contributes is one directional derivative of its ordinary gradient (docs/adjoint.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.augment import Augment
from mtt_fast.choice import student_for
from mtt_fast.errors import InputError
from mtt_fast.kernels import LabelKind, Precision
from mtt_fast.memory import microbatch_for
from mtt_fast.student import Loss, Network, Student, in_microbatches


def unroll(
    net: Network,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor | float,
    batches: Tensor | Sequence[Tensor],
    augment: Augment | None = None,
    microbatch: int | None = None,
    memory_budget: int | str | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    *,
    label_kind: LabelKind | None = None,
    loss: Loss | None = None,
    generator: torch.Generator | None = None,
    precision: Precision = "fp32",
) -> Tensor:
    """Train a student for N steps of SGD on synthetic images; return its path θ_0 … θ_N, shape (N + 1, P).

    Any function of any rows of the path can be differentiated, with exact gradients to `theta`, `images`, floating
    `labels` and `lr` through all N steps (the paper's algorithm 1, lines 8 to 12). The graph kept is the path itself:
    peak memory is that of one step of one micro-batch, whatever N. Differentiable once.

    Args:
        net: the student's network, `net(theta, images) -> logits`.
        theta: initial parameters (P,), float32 or float64; all arithmetic is in this dtype.
        images: all synthetic images (n, C, H, W).
        labels: class indices (n,), or soft labels (n, classes).
        lr: learning rate, a scalar (tensor), or one a step (N,).
        batches: indices into `images`, (N, b), or N index vectors of any lengths; an index may come again.
        augment: its numbers are drawn here, once a step in order, and used again by the backward sweep.
        microbatch: at most so many samples at once; exact for networks that do not mix samples.
        memory_budget: choose `microbatch` so that the unroll's own peak stays below this, bytes or "6GiB".
        momentum: SGD momentum (as torch.optim.SGD); keeps N more vectors of P.
        weight_decay: SGD weight decay (as torch.optim.SGD).
        label_kind: of soft labels, "probabilities" (the default) or "logits"; "indices" for integers.
        loss: mean loss of a batch from logits and labels instead of cross-entropy.
        generator: source of the augmentation's random numbers.
        precision: of the factors of float32 convolutions in ConvNet's fused step, "fp32", "tf32" or "bf16"; sums are
            float32. Any other network takes torch's own settings.

    Raises:
        InputError: shapes, dtypes, indices or options that do not fit each other.
    """
    indices = _checked_batches(batches, images)
    lr = torch.as_tensor(lr, dtype=None if isinstance(lr, Tensor) else theta.dtype, device=theta.device)
    _check_tensors(theta, images, labels, lr, len(indices), net)
    if microbatch is not None and memory_budget is not None:
        raise InputError("unroll: expected microbatch or memory_budget, found both; give one")
    student = student_for(net, theta.device, _kind_of(labels, label_kind), loss, precision)
    if memory_budget is not None:
        largest = max(len(index) for index in indices)
        microbatch = microbatch_for(
            net, student, memory_budget, theta.dtype, images, batch=largest, steps=len(indices), momentum=momentum != 0
        )
    step = _Steps(
        student=student if microbatch is None else in_microbatches(student, net, microbatch),
        batches=indices,
        augment=augment,
        draws=tuple(augment.draw(images.detach()[index], generator) if augment else None for index in indices),
        momentum=momentum,
        weight_decay=weight_decay,
    )
    path, *rows = _Unroll.apply(step, theta, images, labels, lr)
    path = path.as_subclass(_Path)
    path.rows = tuple(rows)
    return path  # type: ignore[no-any-return]


class _Path(Tensor):
    """A path whose single rows remember that they are rows.

    The gradient of an ordinary `path[-1]` is as large as the path, and all zeros but for one row.
    """

    rows: tuple[Tensor, ...]
    # what is computed from a path is an ordinary tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Tensor:
        return self.rows[index] if isinstance(index, int) else super().__getitem__(index)


@dataclass(frozen=True)
class _Steps:
    """What both sweeps need to know besides the tensors that are differentiated."""

    student: Student
    batches: tuple[Tensor, ...]
    augment: Augment | None
    draws: tuple[Any, ...]
    momentum: float
    weight_decay: float

    def augmented(self, images: Tensor, n: int) -> Tensor:
        """The images that step n sees, from the batch's own; contiguous, as networks and kernels expect them."""
        return (self.augment(images, self.draws[n]) if self.augment else images).contiguous()

    def wanted(self, labels: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        """The labels of step n, in the types that losses expect."""
        chosen = labels[self.batches[n]]
        return chosen.to(dtype) if chosen.is_floating_point() else chosen.long()


class _Unroll(torch.autograd.Function):
    """One node in the user's graph for all N steps."""

    @staticmethod
    def forward(
        ctx: Any, steps: _Steps, theta: Tensor, images: Tensor, labels: Tensor, lr: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the path (N + 1, P), and its rows again, each an output (and a gradient) of its own."""
        count = len(steps.batches)
        rates = _rates(lr, count, theta)
        path = theta.new_empty(count + 1, len(theta))
        path[0] = theta
        # with momentum the update is no longer a function of one step, so its velocities are kept as well
        velocities = theta.new_empty(count, len(theta)) if steps.momentum else None
        for n, index in enumerate(steps.batches):
            seen = steps.augmented(images[index], n).to(theta.dtype)
            _, gradient, _ = steps.student.gradient(path[n], seen, steps.wanted(labels, n, theta.dtype))
            before = velocities[n - 1] if velocities is not None and n > 0 else None
            after = velocities[n] if velocities is not None else None
            kernels.sgd_step(
                path[n],
                gradient.contiguous(),
                rates[n],
                out=path[n + 1],
                velocity=before,
                velocity_out=after,
                momentum=steps.momentum,
                weight_decay=steps.weight_decay,
            )
        ctx.steps = steps
        ctx.save_for_backward(images, labels, lr, path, velocities)
        ctx.set_materialize_grads(False)
        return path, *path.unbind()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_path: Tensor | None, *grad_rows: Tensor | None) -> tuple[Tensor | None, ...]:
        steps: _Steps = ctx.steps
        images, labels, lr, path = (saved.detach() for saved in ctx.saved_tensors[:4])
        velocities: Tensor | None = ctx.saved_tensors[4]
        _, _, wants_images, wants_labels, _ = ctx.needs_input_grad
        rates = _rates(lr, len(steps.batches), path)
        grad_images = torch.zeros_like(images) if wants_images else None
        grad_labels = torch.zeros_like(labels) if wants_labels else None
        grad_rates = torch.zeros_like(rates)

        def incoming(n: int) -> Tensor | None:
            """What the user's loss says of row n: as a row of the path, and as a row by itself."""
            of_row = grad_rows[n]
            if grad_path is None:
                return None if of_row is None else of_row.contiguous()
            return grad_path[n].contiguous() if of_row is None else grad_path[n] + of_row

        adjoint = torch.zeros_like(path[0])  # λ_{n+1}, of the parameters
        if (of_end := incoming(len(steps.batches))) is not None:
            adjoint.copy_(of_end)
        velocity_adjoint = torch.zeros_like(adjoint) if velocities is not None else None  # ν
        for n in reversed(range(len(steps.batches))):
            index = steps.batches[n]
            # the loss depends on g_n through ν·g_n. Without momentum ν = −α λ, and λ itself is used as the
            # direction: it stays defined at α = 0 and gives λ·g_n, which dα needs, for nothing
            if velocity_adjoint is None:
                direction, size = adjoint, -rates[n]
            else:
                direction = velocity_adjoint.mul_(steps.momentum).addcmul_(adjoint, rates[n], value=-1)
                size = torch.ones_like(rates[n])
            with torch.enable_grad():
                batch = images[index].detach().requires_grad_(wants_images)
                seen = steps.augmented(batch, n).to(path.dtype)
            wanted = steps.wanted(labels, n, path.dtype)
            tangent = steps.student.gradient_jvp(path[n], seen.detach(), wanted, direction)

            if velocities is None:
                grad_rates[n] = -(tangent.v_dot_g + steps.weight_decay * torch.dot(direction, path[n]))
            else:
                grad_rates[n] = -torch.dot(adjoint, velocities[n])
            if grad_images is not None:
                (to_batch,) = torch.autograd.grad(seen, batch, size * tangent.images)
                grad_images.index_add_(0, index, to_batch)
            if grad_labels is not None and tangent.labels is not None:
                grad_labels.index_add_(0, index, (size * tangent.labels).to(labels.dtype))
            kernels.adjoint_step(
                adjoint,
                tangent.hessian_v.contiguous(),
                direction,
                size,
                out=adjoint,
                incoming=incoming(n),
                weight_decay=steps.weight_decay,
            )

        grad_lr = (grad_rates if lr.numel() > 1 else grad_rates.sum().view(lr.shape)).to(lr.dtype)
        return None, adjoint, grad_images, grad_labels, grad_lr


def _rates(lr: Tensor, steps: int, like: Tensor) -> Tensor:
    """One learning rate a step (N,), in the dtype and on the device of the parameters."""
    return lr.detach().to(like).expand(steps)


def _kind_of(labels: Tensor, kind: LabelKind | None) -> LabelKind:
    soft = labels.is_floating_point()
    if kind is None:
        return "probabilities" if soft else "indices"
    if (kind == "indices") == soft:
        raise InputError(f"unroll label_kind '{kind}': does not fit labels of dtype {labels.dtype}")
    return kind


def _checked_batches(batches: Tensor | Sequence[Tensor], images: Tensor) -> tuple[Tensor, ...]:
    rows = tuple(batches.unbind(0)) if isinstance(batches, Tensor) else tuple(batches)
    if not rows:
        raise InputError("unroll batches: expected at least one step, found none")
    for n, row in enumerate(rows):
        if row.dim() != 1 or len(row) == 0 or row.is_floating_point() or row.dtype == torch.bool:
            raise InputError(
                f"unroll batches: expected a vector of indices for step {n}, found {row.dtype} of shape {tuple(row.shape)}"
            )
        # on an accelerator the look-up itself checks, without a wait for the device
        if row.device.type == "cpu" and not 0 <= int(row.min()) <= int(row.max()) < len(images):
            raise InputError(
                f"unroll batches: expected indices 0 … {len(images) - 1}, found {int(row.min())} … {int(row.max())} in step {n}"
            )
    return tuple(row.to(images.device, torch.long) for row in rows)


def _check_tensors(theta: Tensor, images: Tensor, labels: Tensor, lr: Tensor, steps: int, net: Network) -> None:
    if theta.shape != (net.num_parameters,) or not theta.is_floating_point():
        raise InputError(
            f"unroll theta: expected ({net.num_parameters},) floating-point parameters of the network, "
            f"found {theta.dtype} of shape {tuple(theta.shape)}"
        )
    if not images.is_floating_point() or len(labels) != len(images):
        raise InputError(
            f"unroll images, labels: expected floating-point images and as many labels, found {images.dtype} of shape "
            f"{tuple(images.shape)} and labels of shape {tuple(labels.shape)}"
        )
    if labels.dim() != (2 if labels.is_floating_point() else 1):
        raise InputError(
            f"unroll labels: expected indices (n,) or soft labels (n, classes), found {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    if lr.dim() > 1 or lr.numel() not in (1, steps):
        raise InputError(
            f"unroll lr: expected a scalar or one rate for each of {steps} steps, found shape {tuple(lr.shape)}"
        )
    devices = {tensor.device for tensor in (theta, images, labels, lr)}
    if len(devices) > 1:
        raise InputError(f"unroll: expected all tensors on one device, found {', '.join(sorted(map(str, devices)))}")
