"""Define the engines that are compared: functions from a case to the gradients of images and learning rate."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import rivals
from bench.cases import Case, Gradients, module_of
from bench.flops import (
    COMPILED_MIXED_STEP,
    DOUBLE_BACKWARD,
    DOUBLE_BACKWARD_TO_IMAGES,
    MIXED_STEP,
    MIXED_STEP_KEPT,
    PLAIN_GRADIENT,
    Passes,
)
from bench.workers import named_function
from mtt_fast import GraphedMatchingLoss, matching_loss, testing, unroll
from mtt_fast.engine.students.choice import student_for
from mtt_fast.engine.students.fused import FusedConvNetStudent
from mtt_fast.errors import InputError
from mtt_fast.kernels import Precision
from mtt_fast.networks.convnet import ConvNet

Run = Callable[..., Gradients]
"""An engine's function; besides the case those of mtt_fast take `microbatch` or `memory_budget`."""


def whole_graph(case: Case) -> Gradients:
    """Build the graph of all N steps, then differentiate it, as the public code does."""
    result = testing.whole_graph(
        _module_function(case), case.start, case.target, case.images, case.labels, case.lr, list(case.batches)
    )
    return Gradients(result.images, result.lr)


def checkpointed(case: Case, microbatch: int | None = None) -> Gradients:
    """Save the parameters of all steps, then rebuild the graph of one step at a time and differentiate it twice. Exact."""
    network, adjoint, path = _module_function(case), *_plain_sweep(case, microbatch)
    to_images, to_lr, lr = torch.zeros_like(case.images), torch.zeros_like(case.lr), float(case.lr)
    for n in reversed(range(len(case.batches))):
        hessian_v = torch.zeros_like(adjoint)
        for index in case.batches[n].split(microbatch or case.batches.shape[1]):
            share = len(index) / case.batches.shape[1]
            theta, images = path[n].clone().requires_grad_(), case.images[index].requires_grad_()
            loss = share * F.cross_entropy(network(theta, images), case.labels[index])
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
            along = gradient @ adjoint
            to_theta, to_batch = torch.autograd.grad(along, (theta, images))
            hessian_v += to_theta
            to_images.index_add_(0, index, to_batch, alpha=-lr)
            to_lr -= along.detach()
        adjoint = adjoint - case.lr * hessian_v
    return Gradients(to_images, to_lr)


def truncated(case: Case) -> Gradients:
    """Use the last adjoint at every step, as TESLA does, which leaves out every Hessian. Not exact."""
    result = testing.truncated(
        _module_function(case), case.start, case.target, case.images, case.labels, case.lr, list(case.batches)
    )
    return Gradients(result.images, result.lr)


class GenericConvNet(ConvNet):
    """A `ConvNet` with a call of its own, so that mtt_fast takes the generic student, as for any other network."""

    def __call__(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return the logits."""
        return super().__call__(theta, images)


@functools.cache
def generic_convnet(net: ConvNet) -> GenericConvNet:
    """Return `net` as a network that takes the generic student; the same object for each call, by which its memory is cached."""
    return GenericConvNet(*astuple(net))


def generic(case: Case, **limits: Any) -> Gradients:
    """Run mtt_fast with the generic student, which uses autograd."""
    return _unrolled(replace(case, net=generic_convnet(case.net)), **limits)


def fused(case: Case, precision: Precision = "fp32", **limits: Any) -> Gradients:
    """Run mtt_fast with the fused student, which is written by hand on the kernels."""
    _fused_student(case, precision)
    return _unrolled(case, precision=precision, **limits)


def fused_loss(case: Case, precision: Precision = "fp32", **limits: Any) -> Gradients:
    """Run `fused` with cross-entropy as a loss of the user's own, which autograd differentiates."""
    return fused(case, precision, loss=F.cross_entropy, **limits)


def fused_graph(case: Case, precision: Precision = "fp32", **limits: Any) -> Gradients:
    """Replay the whole iteration of `fused` from a CUDA graph, as mtt_fast's distillation does too."""
    _fused_student(case, precision)
    graphed_loss = _graphed_loss(case.net, precision, **limits)
    images, lr = (value.detach().clone().requires_grad_() for value in (case.images, case.lr))
    graphed_loss(case.start, case.target, images, case.labels, lr, case.batches).backward()
    if graphed_loss.problem:
        raise InputError(f"fused-graph: not replayed but called: {graphed_loss.problem}")
    return _gradients(images, lr)


def _fused_student(case: Case, precision: Precision) -> FusedConvNetStudent:
    student = student_for(case.net, case.images.device, precision=precision)
    if not isinstance(student, FusedConvNetStudent):
        raise InputError(f"mtt_fast takes {type(student).__name__} here: there are no kernels for {case.images.device}")
    return student


@functools.lru_cache(maxsize=8)  # the small case of the gate, and the one that is timed, of each precision
def _graphed_loss(net: ConvNet, precision: Precision, **limits: Any) -> GraphedMatchingLoss:
    return GraphedMatchingLoss(net, precision=precision, **limits)


def compiled(case: Case) -> Gradients:
    """Run the mixed step of torch.func, compiled by torch.compile; the plain gradients are eager."""
    step = _compiled_step(case.net)
    adjoint, path = _plain_sweep(case)
    to_images, to_lr, lr = torch.zeros_like(case.images), torch.zeros_like(case.lr), float(case.lr)
    for n in reversed(range(len(case.batches))):
        index = case.batches[n]
        (hessian_v, to_batch), along = step(path[n].clone(), case.images[index], case.labels[index], adjoint)
        to_images.index_add_(0, index, to_batch, alpha=-lr)
        to_lr -= along
        adjoint = adjoint - case.lr * hessian_v
    return Gradients(to_images, to_lr)


@functools.cache
def _compiled_step(net: ConvNet) -> Callable[..., tuple[tuple[Tensor, Tensor], Tensor]]:
    """Return the compiled step ((H v, ∂(v·g)/∂x), v·g), forward over reverse, as torch.compile has no double backward."""

    def loss_of(theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(net(theta, images), labels)

    gradients_and_loss = torch.func.grad_and_value(loss_of, argnums=(0, 1))

    def step(theta: Tensor, images: Tensor, labels: Tensor, v: Tensor) -> Any:
        return torch.func.jvp(lambda theta: gradients_and_loss(theta, images, labels), (theta,), (v,))[1]

    return torch.compile(step, dynamic=False)  # here, since the compiler takes seconds to import


def _unrolled(case: Case, **options: Any) -> Gradients:
    images, lr = (value.detach().clone().requires_grad_() for value in (case.images, case.lr))
    path = unroll(case.net, case.start, images, case.labels, lr, case.batches, **options)
    matching_loss(path[-1], start=case.start, target=case.target).backward()
    return _gradients(images, lr)


def _gradients(images: Tensor, lr: Tensor) -> Gradients:
    assert images.grad is not None
    assert lr.grad is not None
    return Gradients(images.grad, lr.grad)


def _module_function(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    return testing.module_function(module_of(case.net).to(case.images))


def _plain_sweep(case: Case, microbatch: int | None = None) -> tuple[Tensor, list[Tensor]]:
    """Return the loss's gradient to the last parameters, and the parameters θ_0 … θ_{N−1}."""
    network, theta, path = _module_function(case), case.start, []
    for batch in case.batches:
        path.append(theta)
        gradient = torch.zeros_like(theta)
        for index in batch.split(microbatch or len(batch)):
            leaf = theta.detach().requires_grad_()
            loss = F.cross_entropy(network(leaf, case.images[index]), case.labels[index])
            gradient += len(index) / len(batch) * torch.autograd.grad(loss, leaf)[0]
        theta = theta - case.lr * gradient
    return 2 * (theta - case.target) / (case.start - case.target).square().sum(), path


@dataclass(frozen=True)
class Engine:
    """An engine: its function, its amount of work, and its properties."""

    run: Run
    passes: tuple[Passes, ...] = ()
    """the work in forward passes; empty if unknown"""
    tuned: bool = True
    """whether glibc keeps freed memory in the engine's process, as it does for mtt_fast's commands"""
    exact: bool = True
    takes_precision: bool = False
    """whether `run` takes a `precision`; other engines follow torch's settings"""
    cuda_only: bool = False
    compiles: bool = False
    """whether its first call compiles, which takes memory too"""
    package: str | None = None
    """the package of another library that it needs"""


ENGINES = {
    "whole_graph": Engine(whole_graph, (PLAIN_GRADIENT, DOUBLE_BACKWARD), tuned=False),
    "whole_graph-tuned": Engine(whole_graph, (PLAIN_GRADIENT, DOUBLE_BACKWARD)),
    "checkpointed": Engine(checkpointed, (PLAIN_GRADIENT, PLAIN_GRADIENT, DOUBLE_BACKWARD)),
    "truncated": Engine(truncated, (PLAIN_GRADIENT, PLAIN_GRADIENT, DOUBLE_BACKWARD_TO_IMAGES), exact=False),
    "generic": Engine(generic, (PLAIN_GRADIENT, PLAIN_GRADIENT, DOUBLE_BACKWARD)),
    "compiled": Engine(compiled, (PLAIN_GRADIENT, COMPILED_MIXED_STEP), compiles=True),
    "fused": Engine(fused, (PLAIN_GRADIENT, MIXED_STEP), takes_precision=True),
    "fused-loss": Engine(fused_loss, (PLAIN_GRADIENT, MIXED_STEP), takes_precision=True),
    "fused-budget": Engine(fused, (PLAIN_GRADIENT, MIXED_STEP), takes_precision=True),
    "fused-auto": Engine(fused, (PLAIN_GRADIENT, MIXED_STEP_KEPT), takes_precision=True),
    "fused-graph": Engine(fused_graph, (PLAIN_GRADIENT, MIXED_STEP), takes_precision=True, cuda_only=True),
    "fused-graph-auto": Engine(fused_graph, (PLAIN_GRADIENT, MIXED_STEP_KEPT), takes_precision=True, cuda_only=True),
    "higher": Engine(rivals.higher, (PLAIN_GRADIENT, DOUBLE_BACKWARD), package="higher"),
    "torchopt": Engine(rivals.torchopt, (PLAIN_GRADIENT, DOUBLE_BACKWARD), package="torchopt"),
    "jax": Engine(rivals.jax, (PLAIN_GRADIENT, COMPILED_MIXED_STEP), compiles=True, package="jax"),
}


def engine_on(name: str, device: torch.device, precision: str) -> tuple[Engine, dict[str, str]]:
    """Return the engine called `name` and its `precision` argument on `device`, if any: a CPU computes only in float32.

    ENGINE@PRECISION names an engine and its precision, which replaces `precision`. Raises `InputError` for an unknown engine or precision, an engine
    that `device` cannot run, or a precision where the engine takes none.
    """
    plain, _, own = name.partition("@")
    engine = engine_named(plain)
    if engine.package and importlib.util.find_spec(engine.package) is None:
        raise InputError(f"--engines {name}: expected the package {engine.package}; pip install {engine.package}")
    if engine.cuda_only and device.type != "cuda":
        raise InputError(f"--engines {name}: expected a CUDA device, found {device}; use fused")
    takes = engine.takes_precision and device.type == "cuda"
    if own and not (takes and own in get_args(Precision)):
        raise InputError(
            f"--engines {name}: expected one of {', '.join(get_args(Precision))} after @, with an engine that takes a precision, on a GPU"
        )
    return engine, {"precision": own or precision} if takes else {}


def engine_named(name: str) -> Engine:
    """Return the engine called `name`, or one that runs the function `name` (MODULE:FUNCTION). Raises `InputError` for any other name."""
    if name in ENGINES:
        return ENGINES[name]
    if ":" in name:
        try:
            return Engine(named_function(name))
        except (ImportError, AttributeError) as error:
            raise InputError(f"--engines {name}: cannot be imported ({error}); expected MODULE:FUNCTION") from error
    raise InputError(f"--engines {name}: no such engine; one of {', '.join(ENGINES)}, or MODULE:FUNCTION of your own")
