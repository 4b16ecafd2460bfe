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
from bench.products import Derivatives, cross_entropy_of, forward_over_reverse, gradients_by, reverse_over_reverse
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
    return gradients_by(reverse_over_reverse, cross_entropy_of(_module_function(case)), case, microbatch)


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
    """Run `fused` with cross-entropy as a user's loss, which autograd differentiates."""
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
    """Run the mixed step of torch.func, compiled by torch.compile, which has no double backward; the plain gradients are eager."""
    product = _compiled_product(case.net)
    return gradients_by(lambda _, *at: product(*at), cross_entropy_of(_module_function(case)), case)


@functools.cache
def _compiled_product(net: ConvNet) -> Callable[..., Derivatives]:
    """Return `forward_over_reverse` of the loss of `net`, compiled."""
    # called here, since the compiler takes seconds to import
    return torch.compile(functools.partial(forward_over_reverse, cross_entropy_of(net)), dynamic=False)


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
