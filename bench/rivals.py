"""Other libraries' ways to differentiate through training, as engines; `pip install -e '.[rivals]'` installs them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from bench.cases import Case, Gradients, module_of
from mtt_fast import matching_loss
from mtt_fast.networks.convnet import ConvNet

_EPSILON = 1e-5  # of torch's norms


def higher(case: Case) -> Gradients:
    """Build the graph of all steps by `higher`, then differentiate it."""
    from higher import innerloop_ctx

    module, images, lr = _module(case), *_learned(case)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    options: dict[str, Any] = {"copy_initial_weights": False, "override": {"lr": [lr]}}
    with innerloop_ctx(module, optimizer, **options) as (student, steps):
        for index in case.batches:
            steps.step(F.cross_entropy(student(images[index]), case.labels[index]))
        return _differentiated(case, student.parameters(), images, lr)


def torchopt(case: Case) -> Gradients:
    """Build the graph of all steps by TorchOpt's `MetaSGD`, then differentiate it."""
    from torchopt import MetaSGD

    module, images, lr = _module(case), *_learned(case)
    optimizer = MetaSGD(module, lr=lr)
    for index in case.batches:
        optimizer.step(F.cross_entropy(module(images[index]), case.labels[index]))
    return _differentiated(case, module.parameters(), images, lr)


def jax(case: Case) -> Gradients:
    """Differentiate step by step, forward over reverse, by two programs that JAX compiles, as MixFlow-MG does (Kemaev et al., ICML 2025).

    The loop over the steps is Python's: in a compiled loop (`lax.scan`) XLA's convolutions on a CPU are many times slower, and
    steps that are written out in one program take the memory of several.
    """
    from jax import config, numpy

    config.update("jax_enable_x64", True)  # for the check in float64; float32 stays float32
    gradient, mixed = _jax_step(case.net)
    tensors = (case.images, case.lr, case.start, case.target, case.labels, case.batches)
    images, lr, theta, target, labels, batches = (numpy.from_dlpack(tensor) for tensor in tensors)
    path = [theta]
    for index in batches:
        path.append(path[-1] - lr * gradient(path[-1], images[index], labels[index]))
    adjoint = 2 * (path.pop() - target) / numpy.square(theta - target).sum()
    to_images, to_lr = numpy.zeros_like(images), numpy.zeros_like(lr)
    for index in batches[::-1]:
        along, hessian_v, to_batch = mixed(path.pop(), images[index], labels[index], adjoint)
        to_images = to_images.at[index].add(-lr * to_batch)
        to_lr = to_lr - along
        adjoint = (adjoint - lr * hessian_v).block_until_ready()
    return Gradients(*(from_dlpack(each.block_until_ready()).clone() for each in (to_images, to_lr)))


def _module(case: Case) -> nn.Module:
    """Return the network as a module with the case's first parameters."""
    module = module_of(case.net).to(case.images)
    nn.utils.vector_to_parameters(case.start.clone(), module.parameters())
    return module


def _learned(case: Case) -> tuple[Tensor, Tensor]:
    images, lr = (value.detach().clone().requires_grad_() for value in (case.images, case.lr))
    return images, lr


def _differentiated(case: Case, last: Iterable[Tensor], images: Tensor, lr: Tensor) -> Gradients:
    """Return the gradients from the student's `last` parameters."""
    theta = torch.cat([parameter.flatten() for parameter in last])
    loss = matching_loss(theta, start=case.start, target=case.target)
    return Gradients(*torch.autograd.grad(loss, (images, lr)))


@functools.cache
def _jax_step(net: ConvNet) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the compiled gradient g of a step, and for a vector v the compiled v·g and its gradients to parameters and images."""
    import jax
    from jax import numpy

    logits_of = _jax_network(net)

    def loss_of(theta: Any, images: Any, labels: Any) -> Any:
        scores = jax.nn.log_softmax(logits_of(theta, images))
        return -numpy.take_along_axis(scores, labels[:, None], 1).mean()

    def mixed(theta: Any, images: Any, labels: Any, v: Any) -> Any:
        both = jax.grad(loss_of, (0, 1))
        (gradient, _), (hessian_v, to_images) = jax.jvp(lambda theta: both(theta, images, labels), (theta,), (v,))
        return v @ gradient, hessian_v, to_images

    return jax.jit(jax.grad(loss_of)), jax.jit(mixed)


def _jax_network(net: ConvNet) -> Callable[[Any, Any], Any]:
    """Return the ConvNet as a function of flat parameters and images (n, C, H, W), with channels last inside."""
    from jax import lax, numpy

    shapes = [parameter.shape for parameter in module_of(net).parameters()]
    ends = [sum(math.prod(shape) for shape in shapes[:end]) for end in range(1, len(shapes))]

    def logits(theta: Any, images: Any) -> Any:
        pieces = numpy.split(theta, ends)
        parameters = iter([piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)])
        x = images.transpose(0, 2, 3, 1)
        for block in range(net.depth):
            padding = 3 if block == 0 and net.in_channels == 1 else 1
            layout = ("NHWC", "OIHW", "NHWC")
            x = lax.conv_general_dilated(
                x, next(parameters), (1, 1), [(padding, padding)] * 2, dimension_numbers=layout
            )
            x = x + next(parameters)
            if net.norm == "instance":
                mean, variance = x.mean((1, 2), keepdims=True), x.var((1, 2), keepdims=True)
                x = (x - mean) * lax.rsqrt(variance + _EPSILON) * next(parameters) + next(parameters)
            n, height, width, channels = x.shape
            x = numpy.maximum(x, 0)[:, : height // 2 * 2, : width // 2 * 2]
            x = x.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))
        weight, bias = parameters
        return x.transpose(0, 3, 1, 2).reshape(len(x), -1) @ weight.T + bias

    return logits
